"""Fits the coefficients of `edgeadapt predict` to measured points, and tells how far it is from points left out.

    python benchmarks/calibrate_prediction.py                      fit results/shapes.json; write the page
    python benchmarks/calibrate_prediction.py --measure BUNDLE...  also measure this machine, and these bundles on it

Writes edgeadapt/profiling/calibration.json and docs/benchmarks/prediction.md. What a machine reaches of its rates (the
shares) can only be told where both were measured: that is what --measure does, best with one thread if others use the
machine too; without it the shares stay as they are.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from host import describe_host
from numpy.typing import NDArray

from edgeadapt.profiling.work import GraphWork, Work

HERE = Path(__file__).resolve().parent
SHAPES, MEASURED = HERE / "results" / "shapes.json", HERE / "results" / "prediction.json"
CALIBRATION = HERE.parent / "edgeadapt" / "profiling" / "calibration.json"
PAGE = HERE.parent / "docs" / "benchmarks" / "prediction.md"
TERMS = ("nodes", "bytes", "int8", "float32")
DECODED_AFTER = 192
"""Tokens before a decoded one: 128 of the prompt and, on average, half of the 128 that follow."""
WIDEN = {"measured": 1.25, "maker": 2.0, "clock": 2.5}
CLOCK_HZ_ASSUMED = 3.5e9
"""Of the machine of shapes.json, a virtual one that does not say it."""
FASTEST = 10
"""Percentile of samples that counts with --measure: others use the machine too, and only make it slower."""


@dataclass(frozen=True)
class Point:
    """One measured time. group: what is left out together."""

    name: str
    group: str
    kind: str
    seconds: float
    work: Work


def main() -> None:
    """Fit, leave out, write."""
    args = _arguments()
    if args.measure:
        MEASURED.write_text(json.dumps(_measure(args.measure, args.threads), indent=1) + "\n", encoding="utf-8")
    data = json.loads(SHAPES.read_text(encoding="utf-8"))
    points = shape_points(data["rows"])
    fitted, errors = fit(points), left_out(points)
    memory, memory_errors = fit_memory(data["rows"])
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    kinds = {kind: [abs(error) for point, error in errors if point.kind == kind] for kind in ("decode", "prefill")}
    result = {
        "schema": "edgeadapt.calibration/1",
        "reference": {
            "title": f"{data['host']['cores']} cores of an {data['host']['cpu']}",
            "operator_s": float(fitted[0]),
            "bytes_per_s": float(1 / fitted[1]),
            "int8_per_s": float(1 / fitted[2]),
            "float32_per_s": float(1 / fitted[3]),
            "clock_hz_assumed": CLOCK_HZ_ASSUMED,
        },
        "shares": measured["shares"],
        "errors": {kind: max(found) for kind, found in kinds.items()},
        "memory": {**memory, "error": max(abs(error) for _, error in memory_errors)},
        "widen": WIDEN,
    }
    CALIBRATION.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(_page(data, result, errors, memory_errors, measured), encoding="utf-8")
    for kind, found in kinds.items():
        print(
            f"{kind}: mean error {np.mean(found):.1%}, largest {max(found):.1%}, {len(found)} points left out by shape"
        )


def shape_points(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """Return the points of shapes.json: a decoded token and two prompts, for each shape, scheme and form."""
    found = []
    for row in rows:
        sizes = row["sizes"]
        head = sizes["vocabulary"] * sizes["hidden"]
        cache = 8 * sizes["layers"] * sizes["key_heads"] * sizes["head_dim"]
        for point, side in zip(row["points"], row["sides"].values(), strict=True):
            extra = 0 if side["adapter"] is None else row["adapter_parameters"]
            graph = GraphWork(
                nodes=point["nodes"],
                weight_bytes=point["bytes"],
                adapter_bytes=4 * extra,
                lowest_bits=0,
                int8_per_row=2 * (row["parameters"] - head),
                int8_once=2 * head,
                float32_per_row=2 * extra,
                float32_once=0,
                float32_per_pair=4 * sizes["layers"] * sizes["heads"] * sizes["head_dim"],
            )
            step = graph.of(1, context=DECODED_AFTER, cache_bytes_per_row=cache)
            found.append(Point(f"{point['name']}, a token", row["shape"], "decode", point["seconds"], step))
            for length in (128, 512):
                key = f"prefill_{length}_s"
                seconds = median(samples[key] for samples in side["rounds"].values() if key in samples)
                work = graph.of(length, cache_bytes_per_row=cache)
                found.append(Point(f"{point['name']}, {length} tokens", row["shape"], "prefill", seconds, work))
    return found


def fit(points: Sequence[Point], least: Sequence[float] = (0, 0, 0, 0)) -> NDArray[np.float64]:
    """Return the cost of one node, byte, int8 and float32 operation; least squares of relative errors.

    No cost is below `least`. Of all subsets of terms that are above it, the one with the smallest error is taken; the
    others cost the least.
    """
    columns = np.array([[getattr(point.work, term) / point.seconds for term in TERMS] for point in points])
    target = 1 - columns @ np.array(least, float)
    scale = columns.max(axis=0)  # so that least squares see numbers of one size
    scale[scale == 0] = 1
    best = float(np.square(target).mean()), np.zeros(len(TERMS))
    for number in range(1, len(TERMS) + 1):
        for chosen in combinations(range(len(TERMS)), number):
            costs = np.zeros(len(TERMS))
            scaled = columns[:, chosen] / scale[list(chosen)]
            costs[list(chosen)] = np.linalg.lstsq(scaled, target, rcond=None)[0] / scale[list(chosen)]
            error = float(np.square(columns @ costs - target).mean())
            if (costs >= 0).all() and error < best[0]:
                best = error, costs
    return np.array(least, float) + best[1]


def left_out(points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Return each point with its relative error under a fit without any point of its group."""
    found = []
    for group in dict.fromkeys(point.group for point in points):
        costs = fit([point for point in points if point.group != group])
        for point in (point for point in points if point.group == group):
            predicted = sum(getattr(point.work, term) * cost for term, cost in zip(TERMS, costs, strict=True))
            found.append((point, float(predicted / point.seconds - 1)))
    return found


def fit_memory(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Return the memory of a process, of a byte of weights by bits and of an adapter's byte; and errors left out."""
    names = ("process_bytes", "weights_4_bits", "weights_8_bits", "adapter")
    lines = []
    for row in rows:
        bits = int(row["scheme"].removeprefix("int"))
        for side, memory in row["memory"].items():
            adapter = 0 if side.endswith("base") else 4 * row["adapter_parameters"]
            weights = row["weights_bytes"]
            lines.append((row["shape"], side, [1, weights * (bits == 4), weights * (bits == 8), adapter], memory))
    resident = np.array([line[3]["resident_bytes"] for line in lines], float)
    columns = np.array([line[2] for line in lines], float) / resident[:, None]
    shapes = np.array([line[0] for line in lines])

    def solved(chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        scale = columns.max(axis=0)
        return np.linalg.lstsq(columns[chosen] / scale, np.ones(chosen.sum()), rcond=None)[0] / scale

    errors = []
    for shape in dict.fromkeys(shapes):
        held = shapes == shape
        predicted = columns[held] @ solved(~held) - 1
        errors += list(zip([line[1] for line in lines if line[0] == shape], predicted.tolist(), strict=True))
    return dict(zip(names, solved(np.ones(len(lines), bool)).tolist(), strict=True)), errors


def _measure(bundles: Sequence[Path], threads: int) -> dict[str, Any]:
    """Return this machine's rates, points of bundles on it, and the shares of the rates that they reach."""
    from edgeadapt.profiling.detect import detect_device
    from edgeadapt.profiling.device_side.system import NoiseMeter

    meter = NoiseMeter()
    before = detect_device("here", threads=threads, clock=_clock(threads)).device
    points = [point for path in bundles for point in _measured_points(path, threads)]
    rates = _best_rates(before, detect_device("here", threads=threads, clock=_clock(threads)).device)
    return {
        "schema": "edgeadapt.benchmark/2",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "host": describe_host(),
        "threads": threads,
        "noise": meter.read(),
        "rates": rates,
        "points": [asdict(point) for point in points],
        "shares": _shares(points, rates),
    }


def _measured_points(path: Path, threads: int) -> list[Point]:
    """Return a bundle's points with its base and its first adapter: a step and two prompts, or a single pass."""
    from edgeadapt import open_session
    from edgeadapt.profiling.predict import counted
    from edgeadapt.profiling.workload import Workload, example_inputs

    points, clock = [], _clock(threads)
    with open_session(path, threads=threads) as session:
        spec = session.spec
        for adapter in (None, session.adapters[0]):
            session.use(adapter)
            name, graph = f"{path.name} {adapter or 'base'}", counted(session.bundle, adapter)
            print(name, file=sys.stderr)
            if spec is None:
                inputs = example_inputs(session, None, Workload((128,), 1, 1))
                length = inputs["input_ids"].shape[1]
                seconds = _fast_s(partial(session.run, inputs), clock, runs=20)
                points.append(Point(f"{name}, {length} tokens", path.name, "prefill", seconds, graph.of(length)))
                continue
            size = spec.cache_bytes_per_token
            for length in (128, 512):
                ids = np.random.default_rng(0).integers(3, spec.vocab_size, (1, length))
                seconds = _fast_s(lambda ids=ids: session.step(ids, session.new_cache(1, 640), logits="last"), clock)
                work = graph.of(length, cache_bytes_per_row=size)
                points.append(Point(f"{name}, {length} tokens", path.name, "prefill", seconds, work))
            cache = session.new_cache(1, 640)
            session.step(ids[:, :128], cache, logits="none")
            seconds = _fast_s(lambda cache=cache: session.step([[1]], cache, logits="last"), clock, runs=128)
            work = graph.of(1, context=DECODED_AFTER, cache_bytes_per_row=size)
            points.append(Point(f"{name}, a token", path.name, "decode", seconds, work))
    return points


def _clock(threads: int) -> Callable[[], float]:
    """Return what tells seconds: with one thread those of the processor, whoever else has it meanwhile."""
    return time.process_time if threads == 1 else time.perf_counter


def _fast_s(run: Callable[[], object], clock: Callable[[], float], runs: int = 3) -> float:
    """Return the FASTEST percentile of the seconds that a run takes, after one that does not count."""
    run()
    samples = []
    for _ in range(runs):
        start = clock()
        run()
        samples.append(clock() - start)
    return float(np.percentile(samples, FASTEST))


def _best_rates(one: Any, other: Any) -> dict[str, float]:
    return {
        "operator": min(one.operator_overhead_s, other.operator_overhead_s),
        "bandwidth": max(one.memory_bandwidth_bytes_per_s, other.memory_bandwidth_bytes_per_s),
        "int8": max(one.peak_ops_int8, other.peak_ops_int8),
        "float32": max(one.peak_flops_float32, other.peak_flops_float32),
    }


def _shares(points: Sequence[Point], rates: dict[str, float]) -> dict[str, float]:
    """Return what runs reach of each rate, at most all of it: no machine is faster than its rates."""
    inverse = {name: 1 / rates[name] for name in ("bandwidth", "int8", "float32")}
    costs = fit(points, (rates["operator"], *inverse.values()))
    shares = {name: float(inverse[name] / cost) for name, cost in zip(inverse, costs[1:], strict=True)}
    return {"operator": float(costs[0] / rates["operator"]), **shares}


def _page(
    data: dict[str, Any],
    result: dict[str, Any],
    errors: Sequence[tuple[Point, float]],
    memory_errors: Sequence[tuple[str, float]],
    measured: dict[str, Any],
) -> str:
    reference, shares, kept = result["reference"], result["shares"], result["memory"]
    rows = [f"| {point.name} | {point.seconds * 1e3:.1f} | {error:+.1%} |" for point, error in errors]
    memory = [f"| {name.removeprefix('edgeadapt ')} | {error:+.1%} |" for name, error in memory_errors]
    means = {
        kind: np.mean([abs(error) for point, error in errors if point.kind == kind]) for kind in ("decode", "prefill")
    }
    others = measured["noise"]["others_ratio"]
    disturbed = "not told by this system" if others is None else f"{others:.0%} of the cores' time"
    return f"""# How far predictions are off

Written by `python benchmarks/calibrate_prediction.py` from `benchmarks/results/shapes.json` ({data["date"]},
{reference["title"]}, {data["setting"]["threads"]} threads) and `benchmarks/results/prediction.json`.
`edgeadapt predict` uses the same fit (`edgeadapt/profiling/calibration.json`).

    seconds = operators * overhead + bytes / bandwidth + int8 / rate + float32 / rate

| term | fitted | share of a measured rate |
| --- | --- | --- |
| one operator | {reference["operator_s"] * 1e6:.2f} µs | {shares["operator"]:.2f} x a small operator alone |
| memory | {reference["bytes_per_s"] / 1e9:.1f} GB/s | {shares["bandwidth"]:.2f} |
| int8 products | {reference["int8_per_s"] / 1e9:.0f} G/s | {shares["int8"]:.2f} |
| float32: adapters, attention | {reference["float32_per_s"] / 1e9:.0f} G/s | {shares["float32"]:.2f} |

Shares were measured on {measured["date"]} on {measured["host"]["cpu"]}
with {measured["threads"]} thread(s): the fastest tenth of the samples, with one thread by the processor's time. Other
processes used {disturbed} meanwhile, and with it caches and memory: the shares are rough, and
measuring them anew on a quiet machine is one command. A share is at most 1, as no machine is faster than its rates.

## Points left out

Each shape's points are predicted by a fit to the other shapes alone: the error is what a model that was never measured
has on a machine that was. Mean of the sizes: {means["decode"]:.1%} for a decoded token, {means["prefill"]:.1%} for a
prompt; the largest ones, {result["errors"]["decode"]:.1%} and {result["errors"]["prefill"]:.1%}, are the interval.

| point | measured ms | error |
| --- | --- | --- |
{chr(10).join(rows)}

Memory after a run, resident: a process of {kept["process_bytes"] / 1e6:.0f} MB, and for each byte of weights
{kept["weights_4_bits"]:.2f} bytes in 4-bit bundles, {kept["weights_8_bits"]:.2f} in 8-bit ones: file and repacked copy.

| side | error |
| --- | --- |
{chr(10).join(memory)}

## A device that was never measured

No such device was measured here, so its error is not known. The interval is wider by what is assumed: a factor of
{WIDEN["maker"]:g} for rates that a maker tells, {WIDEN["clock"]:g} for an operator's cycles being those of
{reference["title"]} (whose clock, not told, is taken for {CLOCK_HZ_ASSUMED / 1e9:.1f} GHz), and {WIDEN["measured"]:g}
for rates that `edgeadapt devices detect` measured there, as shares come from one machine.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, nargs="+", metavar="BUNDLE", help="measure these here, too")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
