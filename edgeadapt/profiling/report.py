"""A profile as rows for people."""

from __future__ import annotations

from edgeadapt.profiling.profile import Profile


def rows(profile: Profile) -> list[dict[str, str]]:
    """Return the figures that were measured as rows of "figure" and "value", in units that people read."""
    unit = "token" if profile.ttft_s is not None else "run"
    work = profile.workload
    values = [
        ("process start", _time(profile.process_start_s)),
        ("load", _time(profile.load_time_s)),
        ("first run", _time(profile.first_run_s)),
        (f"time to first token ({work.prompt_tokens} prompt tokens)", _time(profile.ttft_s)),
        ("prefill", _rate(profile.prefill_tokens_per_s)),
        (f"decode ({work.new_tokens} new tokens)", _rate(profile.decode_tokens_per_s)),
        (
            f"latency per {unit}, p50 / p90 / p95 / p99",
            " / ".join(
                _time(value) or "-"
                for value in (
                    profile.latency_p50_s,
                    profile.latency_p90_s,
                    profile.latency_p95_s,
                    profile.latency_p99_s,
                )
            ),
        ),
        *_adapter_rows(profile),
        *_memory_rows(profile),
        ("size on disk", _size(profile.sizes.total_bytes)),
        *((f"adapter {name} on disk", _size(size)) for name, size in profile.sizes.by_adapter_bytes.items()),
    ]
    return [{"figure": name, "value": value} for name, value in values if value is not None]


def _adapter_rows(profile: Profile) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    if profile.adapter_tax is not None:
        change = profile.adapter_tax.ratio - 1
        found.append((f"time with adapter {profile.adapter_tax.adapter} against none", f"{change:+.1%}"))
    if profile.swap is not None:
        both = f"{_time(profile.swap.resident_s)} / {_time(profile.swap.from_disk_s)}"
        found.append((f"swap to {profile.swap.adapter}, from memory / from disk", both))
    return found


def _memory_rows(profile: Profile) -> list[tuple[str, str | None]]:
    memory = profile.memory
    found = [
        ("memory before load", _size(memory.before_load_resident_bytes)),
        ("memory after load", _size(memory.loaded_resident_bytes)),
        ("memory after a run", _size(memory.run_resident_bytes)),
        ("memory at peak", _size(memory.peak_resident_bytes)),
        ("key-value cache, for each token", _size(memory.kv_cache_bytes_per_token)),
    ]
    for name, added in memory.further_adapters_resident_bytes.items():
        found.append((f"memory that adapter {name} adds", _size(added)))
    return found


def _time(value: float | None) -> str | None:
    if value is None:
        return None
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def _rate(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g} tokens/s"


def _size(value: int | None) -> str | None:
    if value is None:
        return None
    sign, size = ("-" if value < 0 else ""), abs(value)
    return f"{sign}{size / 1e6:.1f} MB" if size >= 1e5 else f"{sign}{size / 1e3:.1f} kB"
