"""Samples that a device sent, with the bundle they are of, as a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.fields import from_mapping
from edgeadapt.profiling.figures import (
    SCHEMA,
    AdapterTax,
    Attempt,
    Check,
    Host,
    Memory,
    Noise,
    OperatorTime,
    Prefill,
    Profile,
    Quality,
    Sizes,
    Swap,
    System,
)
from edgeadapt.profiling.samples import paired_ratio, percentile
from edgeadapt.profiling.workload import Workload
from edgeadapt.runtime.spec import decoder_spec

_STEAL, _WAITING, _OTHERS = 0.02, 0.10, 0.08
"""Above these an attempt is noisy. A quiet machine with as many threads as cores shows 0.000, 0.03 and 0.013."""


def disturbances(noise: Noise | None) -> tuple[str, ...]:
    """Return what disturbed a measurement, empty if nothing did or nothing is known."""
    if noise is None:
        return ()
    found = []
    if noise.steal_ratio is not None and noise.steal_ratio > _STEAL:
        found.append(f"the hypervisor took {noise.steal_ratio:.0%} of the CPU time away")
    if noise.waiting_ratio is not None and noise.waiting_ratio > _WAITING:
        found.append(f"some task waited for a core {noise.waiting_ratio:.0%} of the time")
    if noise.others_ratio is not None and noise.others_ratio > _OTHERS:
        found.append(f"other processes used {noise.others_ratio:.0%} of the cores' time")
    return tuple(found)


def attempt_of(samples: Mapping[str, Any]) -> Attempt:
    """Return how one try at the timed figures went."""
    noise = read_noise(samples) or Noise(None, None, None, None, None, None)
    return Attempt(noise, percentile(samples["latency_s"], 50), disturbances(noise))


def noise_score(attempt: Attempt) -> float:
    """Return how noisy an attempt was, for choosing the quietest: 1 is the least that counts as noisy."""
    noise = attempt.noise
    pairs = ((noise.steal_ratio, _STEAL), (noise.waiting_ratio, _WAITING), (noise.others_ratio, _OTHERS))
    return max((value / limit for value, limit in pairs if value is not None), default=0.0)


def read_noise(samples: Mapping[str, Any]) -> Noise | None:
    """Return the noise in samples, None where there is none."""
    found = samples.get("noise")
    return None if found is None else from_mapping(Noise, found, "noise", ProfileError)


def assemble(
    bundle: Bundle,
    device: Device,
    runtime: str,
    workload: Workload,
    found: Mapping[str, Any],
    *,
    adapter: str | None,
    emulated: bool,
    attempts: tuple[Attempt, ...],
    models: Path | None,
    failures: tuple[str, ...],
) -> Profile:
    """Return a profile.

    Args:
        bundle: what was measured.
        device: where; its `threads` are those that were used.
        runtime: what opened it.
        workload: what was run.
        found: samples of all measurements together.
        adapter: what was active.
        emulated: on an emulated processor.
        attempts: all tries at the timed figures; `found` holds the quietest.
        models: a folder of files that were made for the runtime, None where it opens the bundle's own.
        failures: what could not be measured.
    """
    latencies: Sequence[float] = found.get("latency_s") or ()
    p50, p90, p95, p99 = (percentile(latencies, percent) if latencies else None for percent in (50, 90, 95, 99))
    noise = read_noise(found)
    writes = "decoder" in bundle.manifest.graphs
    system, memory = found.get("system"), found.get("memory")
    operators = found.get("operators")
    on_gpu = _on_gpu(found, workload)
    return Profile(
        schema=SCHEMA,
        bundle=bundle.manifest.name,
        task=bundle.manifest.task,
        precision=str(bundle.manifest.quantization.get("scheme", "none")),
        adapter=adapter,
        runtime=runtime,
        runtime_version=found["engine_version"],
        device=device,
        threads=found["threads"],
        workload=workload,
        emulated=emulated,
        process_start_s=found.get("process_start_s"),
        load_time_s=found.get("load_time_s"),
        cold_load_time_s=found.get("cold_load_time_s"),
        first_run_s=found.get("first_run_s"),
        prefills=_prefills(found, workload, reads="encoder" not in bundle.manifest.graphs),
        decode_tokens_per_s=_decode_rate(workload, latencies) if writes and latencies else None,
        runs_per_s=workload.batch_size / p50 if p50 and not writes else None,
        latency_p50_s=p50,
        latency_p90_s=p90,
        latency_p95_s=p95,
        latency_p99_s=p99,
        adapter_tax=_tax(found.get("tax")),
        swap=_swap(found.get("swap")),
        memory=None if memory is None else _memory(memory, bundle),
        sizes=_sizes(bundle, models),
        checks=tuple(from_mapping(Check, row, "checks", ProfileError) for row in found.get("checks") or ()),
        quality=quality_of(bundle, adapter),
        operators=None
        if operators is None
        else tuple(from_mapping(OperatorTime, row, "operators", ProfileError) for row in operators),
        system=None if system is None else from_mapping(System, system, "system", ProfileError),
        host=_host(found, runtime),
        noise=noise,
        attempts=attempts,
        noisy=bool(disturbances(noise)),
        samples=_flat(found) | on_gpu,
        memory_timeline=tuple((float(at), float(held)) for at, held in (memory or {}).get("timeline") or ()),
        notes=tuple(found.get("notes") or ()),
        warnings=(*_scatter(p50, p90), *disturbances(noise)),
        failures=failures,
        gpu_latency_p50_s=percentile(on_gpu["gpu_latency_s"], 50) if on_gpu else None,
    )


def _prefills(found: Mapping[str, Any], workload: Workload, *, reads: bool) -> tuple[Prefill, ...]:
    rows = []
    for count in workload.prompt_tokens:
        taken = (found.get("ttft_s") or {}).get(str(count))
        if taken:
            ttft_s = percentile(taken, 50)
            rows.append(Prefill(count, ttft_s, workload.batch_size * count / ttft_s if reads else None))
    return tuple(rows)


def _decode_rate(workload: Workload, latencies: Sequence[float]) -> float:
    count = workload.new_tokens
    answers = [sum(latencies[first : first + count]) for first in range(0, len(latencies), count)]
    return workload.batch_size * count / percentile(answers, 50)


def _tax(found: Mapping[str, Any] | None) -> AdapterTax | None:
    if found is None:
        return None
    idle = found["idle_s"]
    return AdapterTax(
        found["adapter"],
        paired_ratio(found["active_s"], found["base_s"]),
        None if not idle else paired_ratio(idle, found["base_s"]),
    )


def _swap(found: Mapping[str, Any] | None) -> Swap | None:
    if found is None:
        return None
    medians = {name: percentile(found[name], 50) if found.get(name) else None for name in ("from_disk_s", "blend_s")}
    return Swap(found["adapter"], percentile(found["resident_s"], 50), **medians)


def _memory(stages: Mapping[str, Any], bundle: Bundle) -> Memory:
    spec = decoder_spec(bundle.manifest)
    before, loaded, ran = stages["before_load"], stages["after_load"], stages["after_run"]
    added: dict[str, int | None] = {}
    last = ran.get("resident_bytes")
    for name, use in (stages.get("further_adapters") or {}).items():
        now = use.get("resident_bytes")
        added[name] = None if now is None or last is None else now - last
        last = now
    return Memory(
        before_load_resident_bytes=before.get("resident_bytes"),
        loaded_resident_bytes=loaded.get("resident_bytes"),
        run_resident_bytes=ran.get("resident_bytes"),
        peak_resident_bytes=ran.get("peak_resident_bytes"),
        run_anonymous_bytes=ran.get("anonymous_bytes"),
        run_file_bytes=ran.get("file_bytes"),
        loaded_proportional_bytes=loaded.get("proportional_bytes"),
        run_proportional_bytes=ran.get("proportional_bytes"),
        run_gpu_bytes=ran.get("gpu_bytes"),
        run_gpu_allocator_bytes=ran.get("gpu_allocator_bytes"),
        further_adapters_resident_bytes=added,
        kv_cache_bytes_per_token=None if spec is None else spec.cache_bytes_per_token,
    )


def _sizes(bundle: Bundle, models: Path | None) -> Sizes:
    roles: dict[str, int] = {}
    for record in bundle.manifest.files.values():
        roles[record.role] = roles.get(record.role, 0) + record.size
    manifest_bytes = (bundle.path / "manifest.json").stat().st_size
    adapters = {
        name: bundle.manifest.files[f"adapters/{name}/adapter.onnx_adapter"].size for name in bundle.adapter_names
    }
    made = None if models is None else sum(path.stat().st_size for path in models.rglob("*") if path.is_file())
    return Sizes(sum(roles.values()) + manifest_bytes, dict(sorted(roles.items())), adapters, made)


def quality_of(bundle: Bundle, adapter: str | None) -> Quality | None:
    """Return what a bundle's manifest says of an adapter's quality, or of the base's for None.

    An adapter that was measured in several modes is as good as its worst one; of a merged one the base's rows speak.
    """
    wanted = None if adapter == bundle.manifest.merged else adapter
    found = [row for row in bundle.manifest.quality if row.get("adapter") == wanted]
    if not found:
        return None
    kls = [row["mean_kl"] for row in found if row.get("mean_kl") is not None]
    shares = [row["top1"] for row in found if row.get("top1") is not None]
    return Quality(max(kls, default=None), min(shares, default=None))


def _host(found: Mapping[str, Any], runtime: str) -> Host:
    from edgeadapt import __version__

    facts = dict(found.get("host") or {})
    versions = {"edgeadapt": __version__, **facts.pop("versions", {}), runtime: found["engine_version"]}
    unknown = dict.fromkeys(("cpu", "cores", "machine", "system", "memory_bytes", "gpu"))
    return from_mapping(Host, {**unknown, **facts, "versions": versions}, "host", ProfileError)


def _flat(found: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return every list of seconds by a name of its own."""
    rows: dict[str, Any] = {"latency_s": found.get("latency_s")}
    rows |= {f"ttft_{count}_s": taken for count, taken in (found.get("ttft_s") or {}).items()}
    rows |= {f"tax_{name}": taken for name, taken in (found.get("tax") or {}).items() if name != "adapter"}
    rows |= {f"swap_{name}": taken for name, taken in (found.get("swap") or {}).items() if name != "adapter"}
    return {name: tuple(taken) for name, taken in rows.items() if taken}


def _on_gpu(found: Mapping[str, Any], workload: Workload) -> dict[str, tuple[float, ...]]:
    """Return a GPU's own times of what `latency_s` and `ttft_s` say by the wall's clock, {} where it told none.

    The runner has them in the order of its calls: a text of each length, the first length last, and what it goes on by.
    """
    taken: Sequence[float] = found.get("gpu_s") or ()
    lengths = workload.prompt_tokens[::-1] if found.get("ttft_s") else ()
    if not taken or not lengths:
        return {"gpu_latency_s": tuple(taken)} if taken else {}
    answer = len(lengths) + workload.new_tokens
    texts = [taken[at : at + answer] for at in range(0, len(taken), answer)]
    rows = {f"gpu_ttft_{count}_s": tuple(text[place] for text in texts) for place, count in enumerate(lengths)}
    return {"gpu_latency_s": tuple(seconds for text in texts for seconds in text[len(lengths) :]), **rows}


def _scatter(p50: float | None, p90: float | None) -> tuple[str, ...]:
    if p50 is None or p90 is None or p90 <= 2 * p50:
        return ()
    return (f"latencies scatter: p90 is {p90 / p50:.1f} times p50",)
