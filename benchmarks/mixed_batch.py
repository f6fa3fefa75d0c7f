"""What adapters of their own cost the rows of a batch: one adapter for all rows against one for each, by batch size.

    python benchmarks/mixed_batch.py BUNDLE [-o benchmarks/results/mixed_batch.json] [--rank 8] [--rounds 12]

Every row's adapter is one of the bundle's with noise on its tensors, so that each has tensors of its own; `--rank` cuts
them to their first ranks. One decode step after `--past` tokens is timed, interleaved, both
forms in one graph: another session's threads, which spin for a while after each run, would disturb the next one's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from edgeadapt.runtime import Session, open_session
from edgeadapt.runtime.rowwise import RowBindings
from edgeadapt.runtime.step import run_step


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    with open_session(options.bundle, threads=options.threads) as session:
        names = _adapters(session, max(options.rows), options.rank)
        result = {
            "bundle": options.bundle.name,
            "scheme": session.bundle.manifest.quantization["scheme"],
            "threads": options.threads,
            "past": options.past,
            "rank": options.rank,
            "adapter_bytes": sum(
                t.numpy().nbytes for t in session.active.adapter_tensors(session.active.key_of(names[0])).values()
            ),
            "rows": {str(rows): _measure(session, names, rows, options) for rows in options.rows},
        }
    print(json.dumps(result, indent=2))
    if options.output is not None:
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        options.output.write_text(json.dumps(known | {f"{result['scheme']}-r{options.rank}": result}, indent=2) + "\n")


def _adapters(session: Session, count: int, rank: int) -> list[str]:
    """Lend `count` adapters and return their names."""
    rng = np.random.default_rng(0)
    names = []
    ranked = {slot.inputs["a"]: 1 for slot in session.bundle.manifest.slots}  # the axis that is the rank
    ranked |= {slot.inputs["b"]: 0 for slot in session.bundle.manifest.slots}
    for index in range(count):
        source = session.bundle.adapter_tensors(session.bundle.adapter_names[index % len(session.bundle.adapter_names)])
        noisy = {}
        for name, value in source.items():
            cut = value.take(range(min(rank, value.shape[ranked[name]])), axis=ranked[name])
            noisy[name] = cut * rng.normal(1, 0.01, cut.shape).astype(np.float32)
        session.lend(f"made-{index}", noisy)
        names.append(f"made-{index}")
    return names


def _measure(session: Session, names: list[str], rows: int, options: argparse.Namespace) -> dict[str, object]:
    keys = [session.active.key_of(name) for name in names[:rows]]
    bindings = RowBindings(session, rows)
    forms = {
        "one_adapter": bindings.one(keys[0]),
        "all_distinct": bindings.several(keys) if rows > 1 else bindings.one(keys[0]),
    }
    cache = session.new_cache(rows, options.past + 1)
    rng = np.random.default_rng(1)
    prompt = rng.integers(100, 10000, (rows, options.past))
    run_step(forms["one_adapter"], session.require_decoder(), prompt, cache, logits="none")
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    cpu: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(options.rounds + 1):
        for name, binding in forms.items():
            ids = rng.integers(100, 10000, (rows, 1))
            start, start_cpu = time.perf_counter(), time.process_time()
            run_step(binding, session.require_decoder(), ids, cache, logits="last")
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
            for row in range(rows):
                cache.shorten(row, options.past)
    wall = {name: np.asarray(values[1:]) for name, values in seconds.items()}
    return {
        "step_s": {name: float(np.median(values)) for name, values in wall.items()},
        "step_cpu_s": {name: float(np.median(values[1:])) for name, values in cpu.items()},
        "distinct_against_one": float(np.median(wall["all_distinct"] / wall["one_adapter"])),
        "distinct_against_one_low": float(np.quantile(wall["all_distinct"] / wall["one_adapter"], 0.25)),
        "distinct_against_one_high": float(np.quantile(wall["all_distinct"] / wall["one_adapter"], 0.75)),
        "tokens_per_s_distinct": float(rows / np.median(wall["all_distinct"])),
    }


if __name__ == "__main__":
    main()
