"""The mean seconds of a token after a prompt, or of a pass, by one clock around all of them: no profiler.

python benchmarks/bare_loop.py BUNDLE PROMPT_TOKENS NEW_TOKENS REPEATS PASSES_PER_REPEAT
"""

from __future__ import annotations

import sys
from time import perf_counter

import numpy as np

from edgeadapt import open_session
from edgeadapt.profiling.workload import Workload, example_inputs


def main() -> None:
    """Print it."""
    prompt, new, repeats, passes = map(int, sys.argv[2:])
    with open_session(sys.argv[1]) as session:
        spec = session.spec
        if spec is None:
            inputs = example_inputs(session, None, Workload((prompt,), new, repeats))
            session.run(inputs)
            start = perf_counter()
            for _ in range(repeats * passes):
                session.run(inputs)
            print((perf_counter() - start) / (repeats * passes))
            return
        ids, taken = np.random.default_rng(0).integers(3, spec.vocab_size, (1, prompt)), 0.0
        for number in range(repeats + 1):
            cache = session.new_cache(1, prompt + new)
            token = session.step(ids, cache, logits="last")[:, -1].argmax(axis=-1)[:, None]
            start = perf_counter()
            for _ in range(new):
                token = session.step(token, cache, logits="last")[:, -1].argmax(axis=-1)[:, None]
            taken += (perf_counter() - start) * (number > 0)  # the first one warms up
        print(taken / repeats / new)


if __name__ == "__main__":
    main()
