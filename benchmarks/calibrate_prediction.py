"""Fits the coefficients of `edgeadapt predict` to measured points, and tells how far it is from points left out.

    python benchmarks/calibrate_prediction.py                      fit results/shapes.json; write the page
    python benchmarks/calibrate_prediction.py --measure BUNDLE...  also measure this machine, and these bundles on it

Writes edgeadapt/profiling/calibration.json and docs/benchmarks/prediction.md. What a machine reaches of its rates (the
shares) can only be told where both were measured: that is what --measure does (`prediction_points.py`), with nothing
else running; without it the shares stay as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prediction_points import FACTORS, Point, fit, held_out, left_out, measure, shares_of

from edgeadapt.profiling.work import GraphWork

HERE = Path(__file__).resolve().parent
SHAPES, MEASURED = HERE / "results" / "shapes.json", HERE / "results" / "prediction.json"
CALIBRATION = HERE.parent / "edgeadapt" / "profiling" / "calibration.json"
PAGE = HERE.parent / "docs" / "benchmarks" / "prediction.md"
DECODED_AFTER = 192
"""Tokens before a decoded one: 128 of the prompt and, on average, half of the 128 that follow."""
WIDEN = {"measured": 1.25, "maker": 2.0, "clock": 2.5}
CLOCK_HZ_ASSUMED = 3.5e9
"""Of the machine of shapes.json, a virtual one that does not say it."""


def main() -> None:
    """Fit, leave out, write."""
    args = _arguments()
    if args.measure:
        MEASURED.write_text(json.dumps(measure(args.measure, args.threads), indent=1) + "\n", encoding="utf-8")
    data = json.loads(SHAPES.read_text(encoding="utf-8"))
    points = shape_points(data["rows"])
    fitted, errors = fit(points), left_out(points)
    memory, memory_errors = fit_memory(data["rows"])
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    here = [Point.read(point) for point in measured["points"]]
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
        "shares": shares_of(here, measured["rates"]),
        "errors": interval(points, here, measured["rates"]),
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


def interval(shapes: Sequence[Point], here: Sequence[Point], rates: dict[str, Any]) -> dict[str, float]:
    """Return the largest relative error of points left out, by kind: of shapes, precisions, thread counts, runtimes.

    A model left out is not counted: of the two measured here one is an encoder, which says nothing of a token.
    """
    errors = left_out(shapes)
    for factor in ("precision", "threads", "runtime"):
        errors += held_out(here, rates, factor)
    return {kind: max(abs(error) for point, error in errors if point.kind == kind) for kind in ("decode", "prefill")}


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
    measured_points = [Point.read(point) for point in measured["points"]]
    held = {name: held_out(measured_points, measured["rates"], name) for name in FACTORS}
    here = [f"| {factor} | {_sizes(found, 'decode')} | {_sizes(found, 'prefill')} |" for factor, found in held.items()]
    each = zip(*held.values(), strict=True)
    points = [
        f"| {found[0][0].name} | {found[0][0].seconds * 1e3:.1f} | "
        + " | ".join(f"{error:+.0%}" for _, error in found)
        + " |"
        for found in each
    ]
    counts = " and ".join(str(count) for count in sorted({point.threads for point, _ in held["threads"]}))
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

Shares were measured on {measured["date"]} on {measured["host"]["cpu"]} with {counts} threads: medians of
`edgeadapt profile`. A share is at most 1, as no machine is faster than its rates.

## Points left out

Each shape's points are predicted by a fit to the other shapes alone: the error is what a model that was never measured
has on a machine that was. Mean of the sizes: {means["decode"]:.1%} for a decoded token, {means["prefill"]:.1%} for a
prompt.

| point | measured ms | error |
| --- | --- | --- |
{chr(10).join(rows)}

## Another model, precision, number of threads or runtime

On {measured["host"]["cpu"]}, whose rates were measured with each number of threads: all points with one value of a
column are predicted with shares that were fitted to the others alone. Sizes of the errors, mean (largest). Without its
model a decoder is predicted from an encoder, which says nothing of a token; two models are too few for that column. The
largest errors of all other columns and of the points above, {result["errors"]["decode"]:.0%} for a token and
{result["errors"]["prefill"]:.0%} for a prompt or a text, are the interval of `edgeadapt predict`.

| left out | a decoded token | a prompt or a text |
| --- | --- | --- |
{chr(10).join(here)}

| point | measured ms | {" | ".join(f"its {name} left out" for name in held)} |
| --- | --- | {" | ".join("---" for _ in held)} |
{chr(10).join(points)}

## Memory

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


def _sizes(found: Sequence[tuple[Point, float]], kind: str) -> str:
    sizes = [abs(error) for point, error in found if point.kind == kind]
    return f"{np.mean(sizes):.0%} ({max(sizes):.0%})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, nargs="+", metavar="BUNDLE", help="measure these here, too")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="each of these numbers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
