"""Medians and spreads of raw samples; ratios are of paired samples (the same round), not of medians."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles


def summary(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles (of two samples or more), smallest, largest and count."""
    first, _, third = quantiles(samples, method="inclusive") if len(samples) > 1 else (samples[0],) * 3
    return {
        "median": median(samples),
        "quartile1": first,
        "quartile3": third,
        "min": min(samples),
        "max": max(samples),
        "n": len(samples),
    }


def ratio_summary(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float | int]:
    """The summary of numerator[i] / denominator[i]."""
    return summary([a / b for a, b in zip(numerator, denominator, strict=True)])
