"""Every figure that a budget, a comparison or a table of numbers may name: the one place that says how it is read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import ProfileError
from edgeadapt.profiling.figures import Profile
from edgeadapt.profiling.workload import Workload

Array = NDArray[np.float64]
Unit = Literal["s", "bytes", "per_s", "ratio", "J", "nats"]


@dataclass(frozen=True)
class Figure:
    """A number of a profile.

    title: for people; unit: what one is; more_is_better: a budget for it is a least value, not a most
    read: the value, None where it was not measured
    samples: the raw samples that it is made of, None where it is no statistic of several; statistic: how,
        of float64[..., samples], one value for each row of them
    short_title: for the head of a narrow column, None where the title will do
    """

    title: str
    unit: Unit
    read: Callable[[Profile], float | None]
    more_is_better: bool = False
    samples: Callable[[Profile], Sequence[float] | None] | None = None
    statistic: Callable[[Array], Array] | None = None
    short_title: str | None = None


def _part(part: str, name: str) -> Callable[[Profile], float | None]:
    """Return a reader of a field of a part of a profile that may be missing."""

    def read(profile: Profile) -> float | None:
        found = getattr(profile, part)
        return None if found is None else getattr(found, name)

    return read


def _own(name: str) -> Callable[[Profile], float | None]:
    def read(profile: Profile) -> float | None:
        value: float | None = getattr(profile, name)
        return value

    return read


def _sampled(name: str) -> Callable[[Profile], Sequence[float] | None]:
    return lambda profile: profile.samples.get(name)


def _first_tokens(profile: Profile) -> Sequence[float] | None:
    return profile.samples.get(f"ttft_{profile.prefills[0].prompt_tokens}_s") if profile.prefills else None


def _prompts(profile: Profile) -> Sequence[float] | None:
    taken = _first_tokens(profile)
    if taken is None or profile.prefill_tokens_per_s is None:
        return None
    return [profile.workload.batch_size * profile.prefills[0].prompt_tokens / seconds for seconds in taken]


def _answers(profile: Profile) -> Sequence[float] | None:
    """Return the rate of each whole answer."""
    latencies = profile.samples.get("latency_s")
    if latencies is None or profile.decode_tokens_per_s is None:
        return None
    work: Workload = profile.workload
    starts = range(0, len(latencies), work.new_tokens)
    return [work.batch_size * work.new_tokens / sum(latencies[at : at + work.new_tokens]) for at in starts]


def _runs(profile: Profile) -> Sequence[float] | None:
    if profile.runs_per_s is None:
        return None
    return [profile.workload.batch_size / seconds for seconds in profile.samples.get("latency_s", ())]


def _worst_error(profile: Profile) -> float | None:
    return max((check.relative_error for check in profile.checks), default=None)


def _percentile(samples: Array, percent: float) -> Array:
    return np.asarray(np.percentile(samples, percent, axis=-1))


_median: Callable[[Array], Array] = partial(_percentile, percent=50)


def _median_rate(rates: Array) -> Array:
    """Return the rate of the median time."""
    return np.asarray(1 / _median(1 / rates))


def _latency(percent: int) -> Figure:
    return Figure(
        f"latency p{percent}",
        "s",
        _own(f"latency_p{percent}_s"),
        samples=_sampled("latency_s"),
        statistic=partial(_percentile, percent=percent),
        short_title=f"p{percent}",
    )


def _memory(title: str, name: str, short_title: str | None = None) -> Figure:
    return Figure(title, "bytes", _part("memory", name), short_title=short_title)


def _swap(title: str, name: str) -> Figure:
    return Figure(title, "s", _part("swap", name), samples=_sampled(f"swap_{name}"), statistic=_median)


FIGURES: Mapping[str, Figure] = {
    "process_start_s": Figure("process start", "s", _own("process_start_s")),
    "load_time_s": Figure("load", "s", _own("load_time_s")),
    "cold_load_time_s": Figure("load, files only on storage", "s", _own("cold_load_time_s")),
    "first_run_s": Figure("first run", "s", _own("first_run_s")),
    "ttft_s": Figure(
        "time to first token",
        "s",
        _own("ttft_s"),
        samples=_first_tokens,
        statistic=_median,
        short_title="first token",
    ),
    "prefill_tokens_per_s": Figure(
        "prefill, tokens", "per_s", _own("prefill_tokens_per_s"), True, samples=_prompts, statistic=_median_rate
    ),
    "decode_tokens_per_s": Figure(
        "decode, tokens",
        "per_s",
        _own("decode_tokens_per_s"),
        True,
        samples=_answers,
        statistic=_median_rate,
        short_title="tokens",
    ),
    "runs_per_s": Figure("throughput, rows", "per_s", _own("runs_per_s"), True, samples=_runs, statistic=_median_rate),
    **{f"latency_p{percent}_s": _latency(percent) for percent in (50, 90, 95, 99)},
    "gpu_latency_p50_s": Figure(
        "latency p50 on the GPU's clock",
        "s",
        _own("gpu_latency_p50_s"),
        samples=_sampled("gpu_latency_s"),
        statistic=_median,
    ),
    "adapter_tax_ratio": Figure("time with the adapter against none", "ratio", _part("adapter_tax", "ratio")),
    "adapter_tax_idle_ratio": Figure(
        "time with adapters in place, none active", "ratio", _part("adapter_tax", "idle_ratio")
    ),
    "swap_resident_s": _swap("swap from memory", "resident_s"),
    "swap_from_disk_s": _swap("swap from disk", "from_disk_s"),
    "swap_blend_s": _swap("swap to a blend", "blend_s"),
    "before_load_resident_bytes": _memory("memory before load", "before_load_resident_bytes"),
    "loaded_resident_bytes": _memory("memory after load", "loaded_resident_bytes"),
    "run_resident_bytes": _memory("memory after a run", "run_resident_bytes"),
    "peak_resident_bytes": _memory("memory at peak", "peak_resident_bytes", "peak"),
    "run_anonymous_bytes": _memory("the process's own memory after a run", "run_anonymous_bytes"),
    "run_file_bytes": _memory("mapped files after a run", "run_file_bytes"),
    "loaded_proportional_bytes": _memory("proportional memory after load", "loaded_proportional_bytes"),
    "run_proportional_bytes": _memory("proportional memory after a run", "run_proportional_bytes"),
    "run_gpu_bytes": _memory("memory of the GPU after a run", "run_gpu_bytes"),
    "run_gpu_allocator_bytes": _memory("memory of the GPU that the runtime reserved", "run_gpu_allocator_bytes"),
    "kv_cache_bytes_per_token": _memory("key-value cache, for each token", "kv_cache_bytes_per_token"),
    "total_bytes": Figure("size on disk", "bytes", _part("sizes", "total_bytes"), short_title="on disk"),
    "model_bytes": Figure("models made for this runtime", "bytes", _part("sizes", "model_bytes")),
    "relative_error": Figure("largest error against the goldens", "ratio", _worst_error),
    "mean_kl": Figure("mean KL from the unquantized model", "nats", _part("quality", "mean_kl"), short_title="mean KL"),
    "top1": Figure(
        "same likeliest answer as unquantized", "ratio", _part("quality", "top1"), True, short_title="same top-1"
    ),
    "energy_j": Figure("energy while timing", "J", _part("system", "energy_j")),
}
"""By name: a field of the profile, or of a part of it; names of tax and swap begin with their part's."""


def figure_name(name: str) -> str:
    """Return the name in `FIGURES` of a figure whose words may stand in any order: p95_latency_s is latency_p95_s.

    Raises:
        ProfileError: if no profile has it, with the nearest and all known ones.
    """
    known = {_words(figure): figure for figure in FIGURES}
    words = _words(name)
    if words in known:
        return known[words]
    close = difflib.get_close_matches(words, known, n=1)
    meant = f"did you mean {known[close[0]]!r}? " if close else ""
    raise ProfileError(f"a profile has no figure {name!r}", hint=f"{meant}known figures: {', '.join(FIGURES)}")


def _words(name: str) -> str:
    return "_".join(sorted(name.lower().split("_")))


def text(name: str, value: float | None) -> str:
    """Return a figure's value as people read it, "not measured" for None."""
    from edgeadapt.profiling.report import size_text, time_text

    if value is None:
        return "not measured"
    shown: dict[str, Callable[[Any], str | None]] = {
        "s": time_text,
        "bytes": lambda size: size_text(round(size)),
        "per_s": lambda rate: f"{rate:.4g} /s",
        "ratio": lambda ratio: f"{ratio:.4g}",
    }
    unit = FIGURES[name].unit
    return (shown[unit](value) if unit in shown else f"{value:.3g} {unit}") or ""
