"""Promotion, measured: what patches take, how tokens flow while one is applied, and what it gives.

    python benchmarks/promotion.py BUNDLE... --adapter NAME -o benchmarks/results/promotion.json

The bundles are exports with `--patches`. Each figure of speed is of greedy steps of one token after a prompt of
`--prompt` tokens. Plain, slots and promoted steps are interleaved, so that noise of the machine falls on all three.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from host import describe_host

from edgeadapt.bundle import open_bundle
from edgeadapt.bundle.patch import parse_patch
from edgeadapt.bundle.patch_files import write_patched
from edgeadapt.quality.calibration import built_in
from edgeadapt.runtime import Session, open_session

Row = dict[str, Any]


def main() -> None:
    """Measure every bundle and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--what", choices=("all", "patches", "timeline", "speed"), default="all")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    result: Row = {"host": describe_host(), "threads": args.threads, "prompt_tokens": args.prompt, "bundles": {}}
    if args.output is not None and args.output.exists():
        result["bundles"] = json.loads(args.output.read_text(encoding="utf-8"))["bundles"]
    for path in args.bundles:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["EDGEADAPT_CACHE_DIR"] = cache
            found = measure(path, args)
        old = result["bundles"].get(path.stem, {})
        result["bundles"][path.stem] = {**old, **found}
    text = json.dumps(result, indent=2) + "\n"
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    print(text, end="")


def measure(path: Path, args: argparse.Namespace) -> Row:
    """Return the figures of one bundle."""
    manifest = open_bundle(path).manifest
    result: Row = {
        "scheme": manifest.quantization["scheme"],
        "weights_bytes": manifest.files["graph/weights.bin"].size,
        "quality": [
            {key: row[key] for key in ("adapter", "promoted", "mean_kl", "top1", "positions")}
            for row in manifest.quality
        ],
    }
    if args.what in {"all", "patches"}:
        result["patches"] = {name: sizes(path, name) for name in open_bundle(path).adapter_names}
    if args.what in {"all", "timeline"}:
        result["timeline"] = timeline(path, args)
    if args.what in {"all", "speed"}:
        result["speed"] = speeds(path, args)
    return result


def sizes(path: Path, name: str) -> Row:
    """Return a patch's size beside its entropy, the adapter's file, and what general compressors make of the change."""
    bundle = open_bundle(path)
    data = bundle.patch_bytes(name)
    patch, _ = parse_patch(data, name, bundle.manifest)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        write_patched(bundle, name, Path(folder))
        apply_s = time.perf_counter() - started
        new = np.fromfile(Path(folder) / "weights.bin", np.uint8)
    old = np.fromfile(bundle.file("graph/weights.bin"), np.uint8)
    regions = [region for file in patch.files if file.path.endswith("weights.bin") for region in file.regions]
    # How the bytes differ, of the first tenth of the regions: lzma at its best takes minutes for all.
    some = regions[:: max(1, len(regions) // 20)]
    parts = [new[r.offset : r.offset + r.length] ^ old[r.offset : r.offset + r.length] for r in some]
    share = sum(region.steps + region.changes for region in some) / len(data)
    change = np.concatenate(parts).tobytes()
    result: Row = {
        "bytes": len(data),
        "entropy_bytes": patch.entropy_bytes,
        "to_entropy": round(len(data) / patch.entropy_bytes, 4),
        "codes": patch.codes,
        "changed": patch.changed,
        "changed_share": round(patch.changed / patch.codes, 5),
        "adapter_bytes": bundle.manifest.files[f"adapters/{name}/adapter.onnx_adapter"].size,
        "apply_s": round(apply_s, 3),
        "lzma_of_the_difference_to_entropy": round(
            len(lzma.compress(change, preset=6)) / share / patch.entropy_bytes, 3
        ),
    }
    try:
        import zstandard
    except ImportError:
        result["zstd_of_the_difference_to_entropy"] = None
    else:
        packed = len(zstandard.ZstdCompressor(level=19).compress(change))
        result["zstd_of_the_difference_to_entropy"] = round(packed / share / patch.entropy_bytes, 3)
    return result


class Steps:
    """Greedy steps of one token of a session, each timed."""

    def __init__(self, session: Session, prompt: int) -> None:
        self.session = session
        self.prompt = np.array([session.text.encode(" ".join(built_in().texts))[:prompt]])
        self.restart()

    def restart(self) -> None:
        """Read the prompt anew."""
        self.cache = self.session.new_cache(1, 2048)
        self.last = int(self.session.step(self.prompt, self.cache, logits="last")[0, -1].argmax())

    def step(self) -> float:
        """Return the seconds of one step."""
        started = time.perf_counter()
        logits = self.session.step(np.array([[self.last]]), self.cache, logits="last")
        self.last = int(logits[0, -1].argmax())
        return time.perf_counter() - started


def timeline(path: Path, args: argparse.Namespace) -> Row:
    """Return how tokens flow before, during and after a promotion, with an empty and a filled cache of the device."""
    return {"empty_cache": _timeline(path, args), "filled_cache": _timeline(path, args)}


def _timeline(path: Path, args: argparse.Namespace) -> Row:
    with open_session(path, threads=args.threads) as session:
        session.use(args.adapter)
        steps = Steps(session, args.prompt)
        before = [steps.step() for _ in range(100)]
        started = time.perf_counter()
        session.promote(args.adapter)
        during = []
        while session.form == "slots":
            during.append(steps.step())
        switched_s = time.perf_counter() - started
        after = [steps.step() for _ in range(100)]
        status = session.promotion(args.adapter)
        assert status.state == "promoted", status
    return {
        "before_tokens_per_s": _rate(before),
        "during_tokens_per_s": round(len(during) / sum(during), 1),
        "during_tokens": len(during),
        "during_longest_step_ms": round(1e3 * max(during), 1),
        "first_promoted_step_ms": round(1e3 * after[0], 1),
        "after_tokens_per_s": _rate(after),
        "ready_s": round(status.seconds or 0.0, 3),
        "switched_s": round(switched_s, 3),
    }


def speeds(path: Path, args: argparse.Namespace) -> Row:
    """Return tokens per second of the three forms, interleaved, and how the promoted form's answers differ."""
    with (
        open_session(path, threads=args.threads) as plain,
        open_session(path, threads=args.threads) as slots,
        open_session(path, threads=args.threads) as promoted,
    ):
        slots.use(args.adapter)
        promoted.promote(args.adapter, wait=True)
        promoted.use(args.adapter)
        sessions = {"plain": plain, "slots": slots, "promoted": promoted}
        runs = {name: Steps(session, args.prompt) for name, session in sessions.items()}
        assert [run.session.form for run in runs.values()] == list(runs)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                times[name].append(median(run.step() for _ in range(args.steps)))
        first = times["plain"]
        return {
            **{f"{name}_tokens_per_s": round(1 / median(found), 1) for name, found in times.items()},
            "slots_tax": _ratio(times["slots"], first),
            "promoted_tax": _ratio(times["promoted"], first),
            "difference": difference(slots, promoted, runs["plain"].prompt),
        }


def difference(slots: Session, promoted: Session, ids: Any) -> Row:
    """Return how the promoted form's logits differ from the slots form's."""
    one, other = (session.run({"input_ids": ids})["logits"][0].astype(np.float64) for session in (slots, promoted))
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (one, other))
    return {
        "mean_kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "same_top1": float((one.argmax(-1) == other.argmax(-1)).mean()),
        "largest": float(np.abs(one - other).max()),
    }


def _rate(seconds: list[float]) -> float:
    return round(1 / median(seconds), 1)


def _ratio(times: list[float], base: list[float]) -> float:
    return round(median(a / b for a, b in zip(times, base, strict=True)) - 1, 4)


if __name__ == "__main__":
    main()
