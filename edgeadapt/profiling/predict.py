"""What a bundle would need on a device that is not there: a roofline with a cost for each operator.

    seconds = operators * overhead + bytes / bandwidth + int8 / rate + float32 / rate

The counts are those of the bundle's graph (`work.py`), the rates the device's, times the share that measured runs reach
of them (`calibration.json`, written by benchmarks/calibrate_prediction.py). The interval is the largest error of points
that were left out of the fit, widened for each rate that was not measured on the device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgeadapt.bundle import Bundle, open_bundle
from edgeadapt.bundle.prefix import is_prefix_tensor
from edgeadapt.device import Device, read_device
from edgeadapt.errors import ProfileError
from edgeadapt.fields import from_mapping
from edgeadapt.profiling.graph_file import read_graph
from edgeadapt.profiling.work import GraphWork, Work, count
from edgeadapt.runtime.spec import decoder_spec

SCHEMA = "edgeadapt.prediction/1"
CALIBRATION = Path(__file__).with_name("calibration.json")
_RUNTIMES = ("session", "onnxruntime")


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval. terms: seconds of each resource; bound_by: the largest of them."""

    value: float
    low: float
    high: float
    terms: dict[str, float]
    bound_by: str


@dataclass(frozen=True)
class MemoryEstimate:
    """Resident bytes after a run, and their interval. terms: what they are made of."""

    value: int
    low: int
    high: int
    terms: dict[str, int]


@dataclass(frozen=True)
class Prediction:
    """What a bundle would need on a device. Nothing of it was measured there.

    ttft_s: reading the prompt; latency_s: one new token after it, or one single pass; memory: None for a precision
    whose memory was never measured; assumptions: what was taken for granted
    """

    schema: str
    predicted: bool
    bundle: str
    device: Device
    adapter: str | None
    prompt_tokens: int
    batch_size: int
    ttft_s: Estimate | None
    latency_s: Estimate
    decode_tokens_per_s: float | None
    memory: MemoryEstimate | None
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Rate:
    """What one unit costs in seconds; widen: by how much it may be wrong either way, beside the fit's error."""

    seconds: float
    widen: float


@dataclass(frozen=True)
class Calibration:
    """`calibration.json`.

    reference: the machine of the fit: seconds of an operator, and the assumed clock of its cores
    shares: measured coefficients over the rates that `edgeadapt devices detect` measured on the same machine
    errors: largest relative error of points left out, by "decode" and "prefill"; memory: see `_memory`
    widen: by how much each assumption may be wrong, as a factor either way
    """

    schema: str
    reference: Mapping[str, Any]
    shares: Mapping[str, float]
    errors: Mapping[str, float]
    memory: Mapping[str, float]
    widen: Mapping[str, float]


@cache
def calibration() -> Calibration:
    """Return what measured machines say."""
    return from_mapping(Calibration, json.loads(CALIBRATION.read_text("utf-8")), str(CALIBRATION), ProfileError)


def predict(
    bundle: Path | str,
    *,
    device: Device | str,
    adapter: str | None = None,
    prompt_tokens: int = 128,
    batch_size: int = 1,
) -> Prediction:
    """Return what a bundle would need on a device, from the device's file alone.

    Args:
        bundle: a bundle's folder.
        device: a device, or its name in devices/.
        adapter: what is active, None for the base.
        prompt_tokens: how long a prompt is (single pass: how long a text is).
        batch_size: texts at once.

    Raises:
        ProfileError: if the device's file lacks what is needed, or the bundle's work cannot be counted.
        BundleError: if it is no bundle, or has no such adapter.
        RecipeError: if there is no such device.
    """
    chosen = read_device(device) if isinstance(device, str) else device
    for name, value in (("prompt_tokens", prompt_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ProfileError(f"{name} is {value}", hint="give a whole number of 1 or more")
    rates, assumptions = device_rates(chosen, calibration())
    opened = open_bundle(bundle)
    graph = counted(opened, adapter)
    spec = decoder_spec(opened.manifest)
    cache_bytes = 0 if spec is None else spec.cache_bytes_per_token
    read = graph.of(prompt_tokens, texts=batch_size, cache_bytes_per_row=cache_bytes)
    errors = calibration().errors
    first = estimate(read, rates, errors["prefill"])
    step = first
    if spec is not None:
        after = graph.of(1, texts=batch_size, context=prompt_tokens, cache_bytes_per_row=cache_bytes)
        step = estimate(after, rates, errors["decode"])
    kept = cache_bytes * batch_size * (prompt_tokens + 1)
    return Prediction(
        schema=SCHEMA,
        predicted=True,
        bundle=opened.path.name,
        device=chosen,
        adapter=adapter,
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
        ttft_s=None if spec is None else first,
        latency_s=step,
        decode_tokens_per_s=None if spec is None else batch_size / step.value,
        memory=_memory(graph, kept, calibration().memory),
        assumptions=assumptions,
    )


def device_rates(device: Device, known: Calibration) -> tuple[dict[str, Rate], tuple[str, ...]]:
    """Return what an operator, a byte and an operation cost on a device, and what is assumed.

    Raises:
        ProfileError: if it runs something that was never measured, or its file does not say what is needed.
    """
    if device.provider != "cpu" or device.runtime not in _RUNTIMES:
        raise ProfileError(
            f"{device.runtime} on {device.provider!r} of {device.name!r} cannot be predicted: only ONNX Runtime on "
            "CPUs was measured for it",
            hint="measure it there with `edgeadapt profile`",
        )
    bandwidth, float32 = device.memory_bandwidth_bytes_per_s, device.peak_flops_float32
    clock = device.operator_overhead_s or device.clock_hz
    needed = {
        "memory_bandwidth_bytes_per_s": bandwidth,
        "peak_flops_float32": float32,
        "clock_hz": clock,
    }
    missing = [name for name, value in needed.items() if value is None]
    if missing or bandwidth is None or float32 is None or clock is None:
        raise ProfileError(
            f"the file of device {device.name!r} does not say {', '.join(missing)}",
            hint="run `edgeadapt devices detect -o FILE.toml` there, and give --device FILE.toml",
        )
    assumptions: list[str] = []
    widen = known.widen["measured"] if device.measured else known.widen["maker"]
    if not device.measured:
        assumptions.append(
            "memory and arithmetic reach the share of the maker's figures that a measured machine reaches of measured "
            f"ones, within a factor of {widen:g}"
        )
    int8 = device.peak_ops_int8
    if int8 is None:
        int8 = float32
        assumptions.append("int8 products are as fast as float32 ones: the device's file says no int8 rate")
    shares = known.shares
    rates = {
        "overhead": _overhead(device, known, assumptions),
        "memory": Rate(1 / (shares["bandwidth"] * bandwidth), widen),
        "int8": Rate(1 / (shares["int8"] * int8), widen),
        "float32": Rate(1 / (shares["float32"] * float32), widen),
    }
    return rates, tuple(assumptions)


def _overhead(device: Device, known: Calibration, assumptions: list[str]) -> Rate:
    if device.operator_overhead_s is not None:
        return Rate(known.shares["operator"] * device.operator_overhead_s, known.widen["measured"])
    assert device.clock_hz is not None  # checked by the caller
    clock, factor = float(known.reference["clock_hz_assumed"]), known.widen["clock"]
    assumptions.append(
        f"an operator takes as many cycles as on {known.reference['title']} at {clock / 1e9:.1f} GHz, within a factor "
        f"of {factor:g}"
    )
    return Rate(float(known.reference["operator_s"]) * clock / device.clock_hz, factor)


def estimate(work: Work, rates: Mapping[str, Rate], error: float) -> Estimate:
    """Return how long `work` takes: the sum of its parts, with an interval.

    Args:
        work: one pass.
        rates: of "overhead", "memory", "int8" and "float32".
        error: largest relative error of the model where all rates are known.
    """
    amounts = {"overhead": work.nodes, "memory": work.bytes, "int8": work.int8, "float32": work.float32}
    parts = {name: amount * rates[name].seconds for name, amount in amounts.items()}
    terms = {
        "overhead": parts["overhead"],
        "memory": parts["memory"],
        "arithmetic": parts["int8"] + parts["float32"],
    }
    return Estimate(
        value=sum(parts.values()),
        low=sum(part / rates[name].widen for name, part in parts.items()) / (1 + error),
        high=sum(part * rates[name].widen for name, part in parts.items()) * (1 + error),
        terms=terms,
        bound_by=max(terms, key=lambda name: terms[name]),
    )


def counted(bundle: Bundle, adapter: str | None) -> GraphWork:
    """Return what a bundle's only graph asks for with an adapter active, None for the base.

    Raises:
        ProfileError: if the bundle has several graphs, or arithmetic that cannot be counted.
        BundleError: if there is no such adapter, or a file is damaged.
    """
    if len(bundle.manifest.graphs) != 1:
        raise ProfileError(
            f"{bundle.manifest.name} has the graphs {', '.join(sorted(bundle.manifest.graphs))}; only bundles of one "
            "graph can be predicted",
            hint="measure it with `edgeadapt profile`",
        )
    (record,) = bundle.manifest.graphs.values()
    shapes: dict[str, tuple[int, ...]] = {}
    name = record.plain
    if adapter is not None and adapter != bundle.manifest.merged:
        tensors = bundle.graph_tensors(adapter)
        shapes = {key: value.shape for key, value in tensors.items() if not is_prefix_tensor(key)}
        name = record.slots or record.plain
    spec = decoder_spec(bundle.manifest)
    once = None if spec is None else spec.vocab_size
    return count(read_graph(bundle.file(name)), adapter=shapes, once_width=once)


def _memory(graph: GraphWork, cache_bytes: int, known: Mapping[str, float]) -> MemoryEstimate | None:
    """Return resident bytes: the process, its weights as file and repacked copy, the adapter, the cache."""
    factor = known.get(f"weights_{graph.lowest_bits}_bits")
    if factor is None:
        return None
    terms = {
        "process": round(known["process_bytes"]),
        "weights": round(factor * (graph.weight_bytes - graph.adapter_bytes)),
        "adapter": round(known["adapter"] * graph.adapter_bytes),
        "cache": cache_bytes,
    }
    value = sum(terms.values())
    return MemoryEstimate(value, round(value / (1 + known["error"])), round(value * (1 + known["error"])), terms)
