"""What predictions are held against: points measured on this machine, fits to them, and errors of those left out."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from host import describe_host
from numpy.typing import NDArray

from edgeadapt.profiling.work import Work

TERMS = ("nodes", "bytes", "int8", "float32")
RATES = {"nodes": "operator", "bytes": "bandwidth", "int8": "int8", "float32": "float32"}
"""The rate that is for a term, as `measure` names it."""
FACTORS = ("model", "precision", "threads", "runtime")
RUNTIMES = ("session", "onnxruntime")
PROMPTS = (128, 512)
NEW_TOKENS, REPEATS = 64, 3


@dataclass(frozen=True)
class Point:
    """One measured time. group: what is left out together; the others are empty where only one was measured."""

    name: str
    group: str
    kind: str
    seconds: float
    work: Work
    model: str = ""
    precision: str = ""
    threads: int = 0
    runtime: str = ""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Point:
        """A point from a results file."""
        return cls(**{**data, "work": Work(**data["work"])})


def measure(bundles: Sequence[Path], threads: Sequence[int]) -> dict[str, Any]:
    """This machine's rates and the bundles' times, with each number of threads and each runtime."""
    from edgeadapt.profiling.detect import detect_device
    from edgeadapt.profiling.device_side.system import NoiseMeter

    meter = NoiseMeter()
    before = [detect_device("here", threads=count).device for count in threads]
    points = []
    for path, runtime, count in product(bundles, RUNTIMES, threads):
        points += _points(path, runtime, count)
    after = [detect_device("here", threads=count).device for count in threads]
    return {
        "schema": "edgeadapt.benchmark/3",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "host": describe_host(),
        "noise": meter.read(),
        "rates": {str(count): _best(*pair) for count, *pair in zip(threads, before, after, strict=True)},
        "points": [asdict(point) for point in points],
    }


def _points(path: Path, runtime: str, threads: int) -> list[Point]:
    """A step and two prompts, or a single pass, with the base and the first adapter."""
    from edgeadapt.bundle import open_bundle
    from edgeadapt.profiling.predict import counted
    from edgeadapt.runtime.spec import decoder_spec

    bundle, points = open_bundle(path), []
    spec, scheme = decoder_spec(bundle.manifest), str(bundle.manifest.quantization["scheme"])
    facts = {"model": bundle.manifest.base.name, "precision": scheme, "threads": threads, "runtime": runtime}
    for adapter in (None, bundle.adapter_names[0]):
        side = f"{facts['model']} {scheme} {adapter or 'base'}, {runtime}, {threads} threads"
        print(side, file=sys.stderr)
        found = _profile(path, adapter, threads, runtime)
        graph, cache = counted(bundle, adapter), 0 if spec is None else spec.cache_bytes_per_token
        step = median(found.samples["latency_s"])
        if spec is None:
            length = _length(path, found.workload)
            points.append(Point(f"{side}, {length} tokens", side, "prefill", step, graph.of(length), **facts))
            continue
        for length in PROMPTS:
            work = graph.of(length, cache_bytes_per_row=cache)
            seconds = median(found.samples[f"ttft_{length}_s"])
            points.append(Point(f"{side}, {length} tokens", side, "prefill", seconds, work, **facts))
        work = graph.of(1, context=PROMPTS[0] + NEW_TOKENS // 2, cache_bytes_per_row=cache)
        points.append(Point(f"{side}, a token", side, "decode", step, work, **facts))
    return points


def _profile(path: Path, adapter: str | None, threads: int, runtime: str) -> Any:
    """Only the timed figures, the quietest of two tries."""
    from edgeadapt.profiling.profile import prepared, read_workload
    from edgeadapt.progress import SILENT

    settings = {"adapter": adapter, "threads": threads, "runtime": runtime, "timeout_s": None, "announce": None}
    workload = read_workload(PROMPTS, NEW_TOKENS, REPEATS, 1)
    with prepared(path, workload, device="cpu", progress=SILENT, **settings) as ready:
        return ready.measure(operators=False, attempts=2, progress=SILENT, beside=())


def _length(path: Path, workload: Any) -> int:
    """How long the text was that a single pass read."""
    from edgeadapt import open_session
    from edgeadapt.profiling.workload import example_inputs

    with open_session(path) as session:
        return int(example_inputs(session, None, workload)["input_ids"].shape[1])


def _best(one: Any, other: Any) -> dict[str, float]:
    return {
        "operator": min(one.operator_overhead_s, other.operator_overhead_s),
        "bandwidth": max(one.memory_bandwidth_bytes_per_s, other.memory_bandwidth_bytes_per_s),
        "int8": max(one.peak_ops_int8, other.peak_ops_int8),
        "float32": max(one.peak_flops_float32, other.peak_flops_float32),
    }


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
    return _left_out(points, [point.group for point in points], (0, 0, 0, 0))


def held_out(points: Sequence[Point], rates: Mapping[str, Any], factor: str) -> list[tuple[Point, float]]:
    """Return each point with its relative error under shares without any point of its model, precision, ..."""
    errors = _left_out(_in_rates(points, rates), [str(getattr(point, factor)) for point in points], (1, 1, 1, 1))
    return [(point, error) for point, (_, error) in zip(points, errors, strict=True)]


def shares_of(points: Sequence[Point], rates: Mapping[str, Any]) -> dict[str, float]:
    """Return what runs reach of each measured rate, at most all of it; an operator costs a multiple of a small one."""
    costs = dict(zip(TERMS, fit(_in_rates(points, rates), (1, 1, 1, 1)).tolist(), strict=True))
    return {RATES[term]: cost if term == "nodes" else 1 / cost for term, cost in costs.items()}


def _left_out(points: Sequence[Point], groups: Sequence[str], least: Sequence[float]) -> list[tuple[Point, float]]:
    found: list[tuple[Point, float]] = [(point, 0.0) for point in points]
    for group in dict.fromkeys(groups):
        costs = fit([point for point, own in zip(points, groups, strict=True) if own != group], least)
        for index in (index for index, own in enumerate(groups) if own == group):
            point = points[index]
            predicted = sum(getattr(point.work, term) * cost for term, cost in zip(TERMS, costs, strict=True))
            found[index] = point, float(predicted / point.seconds - 1)
    return found


def _in_rates(points: Sequence[Point], rates: Mapping[str, Any]) -> list[Point]:
    """Return the points with their work in seconds at the rates of their number of threads."""
    found = []
    for point in points:
        own = rates[str(point.threads)]
        seconds = {
            term: getattr(point.work, term) * (own[name] if name == "operator" else 1 / own[name])
            for term, name in RATES.items()
        }
        found.append(Point(point.name, point.group, point.kind, point.seconds, Work(**seconds)))
    return found
