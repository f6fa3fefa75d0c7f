"""The median seconds of a token after a prompt, or of a pass, in a program of a few lines: no profiler.

python benchmarks/bare_loop.py BUNDLE PROMPT_TOKENS NEW_TOKENS REPEATS PASSES_PER_REPEAT
"""

from __future__ import annotations

import sys
from statistics import median
from time import perf_counter

import numpy as np

from edgeadapt import open_session
from edgeadapt.profiling.workload import Workload, example_inputs


def main() -> None:
    """Print it."""
    prompt, new, repeats, passes = map(int, sys.argv[2:])
    taken: list[float] = []
    with open_session(sys.argv[1]) as session:
        spec = session.spec
        if spec is None:
            inputs = example_inputs(session, None, Workload((prompt,), new, repeats))
            session.run(inputs)
            for _ in range(repeats * passes):
                start = perf_counter()
                session.run(inputs)
                taken.append(perf_counter() - start)
            print(median(taken))
            return
        ids = np.random.default_rng(0).integers(3, spec.vocab_size, (1, prompt))
        for number in range(repeats + 1):
            cache = session.new_cache(1, prompt + new)
            token = session.step(ids, cache, logits="last")[:, -1].argmax(axis=-1)[:, None]
            for _ in range(new):
                start = perf_counter()
                token = session.step(token, cache, logits="last")[:, -1].argmax(axis=-1)[:, None]
                if number:  # the first one warms up
                    taken.append(perf_counter() - start)
        print(median(taken))


if __name__ == "__main__":
    main()
