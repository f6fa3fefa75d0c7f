"""A profile as rows for people."""

from __future__ import annotations

from edgeadapt.profiling.figures import Memory, Profile


def rows(profile: Profile) -> list[dict[str, str]]:
    """Return the figures that were measured as rows of "figure" and "value", in units that people read."""
    unit = "token" if profile.prefills else "run"
    percentiles = (profile.latency_p50_s, profile.latency_p90_s, profile.latency_p95_s, profile.latency_p99_s)
    values = [
        ("process start", time_text(profile.process_start_s)),
        ("load", time_text(profile.load_time_s)),
        ("load, files only on storage", time_text(profile.cold_load_time_s)),
        ("first run", time_text(profile.first_run_s)),
        *_prefill_rows(profile),
        (f"decode ({profile.workload.new_tokens} new tokens)", _rate(profile.decode_tokens_per_s, "tokens")),
        ("throughput", _rate(profile.runs_per_s, "rows")),
        (
            f"latency per {unit}, p50 / p90 / p95 / p99",
            None if profile.latency_p50_s is None else " / ".join(time_text(value) or "-" for value in percentiles),
        ),
        (f"latency per {unit} on the GPU's clock, p50", time_text(profile.gpu_latency_p50_s)),
        *_adapter_rows(profile),
        *(_memory_rows(profile.memory) if profile.memory is not None else ()),
        *_system_rows(profile),
        ("size on disk", size_text(profile.sizes.total_bytes)),
        ("models made for this runtime", size_text(profile.sizes.model_bytes)),
        *((f"adapter {name} on disk", size_text(size)) for name, size in profile.sizes.by_adapter_bytes.items()),
        *_check_rows(profile),
    ]
    return [{"figure": name, "value": value} for name, value in values if value is not None]


def _prefill_rows(profile: Profile) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for each in profile.prefills:
        found.append((f"time to first token ({each.prompt_tokens} prompt tokens)", time_text(each.ttft_s)))
        found.append((f"prefill ({each.prompt_tokens} prompt tokens)", _rate(each.tokens_per_s, "tokens")))
    return found


def _adapter_rows(profile: Profile) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    tax, swap = profile.adapter_tax, profile.swap
    if tax is not None:
        found.append((f"time with adapter {tax.adapter} against none", f"{tax.ratio - 1:+.1%}"))
        if tax.idle_ratio is not None:
            found.append(("time with adapters in place, none active", f"{tax.idle_ratio - 1:+.1%}"))
    if swap is not None:
        both = f"{time_text(swap.resident_s)} / {time_text(swap.from_disk_s) or '-'}"
        found.append((f"swap to {swap.adapter}, from memory / from disk", both))
        found.append((f"swap to a blend with {swap.adapter}", time_text(swap.blend_s)))
    return found


def _memory_rows(memory: Memory) -> list[tuple[str, str | None]]:
    found = [
        ("memory before load", size_text(memory.before_load_resident_bytes)),
        ("memory after load", size_text(memory.loaded_resident_bytes)),
        ("memory after a run", size_text(memory.run_resident_bytes)),
        ("of it the process's own", size_text(memory.run_anonymous_bytes)),
        ("of it mapped files", size_text(memory.run_file_bytes)),
        ("memory at peak", size_text(memory.peak_resident_bytes)),
        ("memory of the GPU after a run", size_text(memory.run_gpu_bytes)),
        ("of it reserved by the runtime", size_text(memory.run_gpu_allocator_bytes)),
        ("key-value cache, for each token", size_text(memory.kv_cache_bytes_per_token)),
    ]
    for name, added in memory.further_adapters_resident_bytes.items():
        found.append((f"memory that adapter {name} adds", size_text(added)))
    return found


def _system_rows(profile: Profile) -> list[tuple[str, str | None]]:
    system = profile.system
    if system is None:
        return []
    clocks = (system.clock_hz_min, system.clock_hz_max)
    warmth = (system.temperature_c_start, system.temperature_c_end)
    return [
        ("energy while timing", None if system.energy_j is None else f"{system.energy_j:.3g} J"),
        ("clock", None if clocks[0] is None else " to ".join(f"{(value or 0) / 1e9:.2f} GHz" for value in clocks)),
        ("temperature", None if warmth[0] is None else " to ".join(f"{value or 0:.0f} °C" for value in warmth)),
    ]


def _check_rows(profile: Profile) -> list[tuple[str, str | None]]:
    """Return how far the answers are from the bundle's goldens, which ONNX Runtime gave when it was made."""
    worst: dict[str, float] = {}
    for check in profile.checks:
        name = f"answer of {check.adapter or 'the base'} against its golden"
        worst[name] = max(check.relative_error, worst.get(name, 0.0))
    return [(name, f"{error:.1e} of the largest value") for name, error in worst.items()]


def time_text(value: float | None) -> str | None:
    """Return seconds in the unit that people read, None for None."""
    if value is None:
        return None
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def _rate(value: float | None, what: str) -> str | None:
    return None if value is None else f"{value:.4g} {what}/s"


def size_text(value: int | None) -> str | None:
    """Return bytes in the unit that people read, None for None."""
    if value is None:
        return None
    sign, size = ("-" if value < 0 else ""), abs(value)
    return f"{sign}{size / 1e6:.1f} MB" if size >= 1e5 else f"{sign}{size / 1e3:.1f} kB"
