"""Medians and spreads of raw samples; ratios are of paired samples (the same round), not of medians."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def summary(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, smallest, largest and count."""
    return {"median": median(samples), "min": min(samples), "max": max(samples), "n": len(samples)}


def ratio_summary(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float | int]:
    """The summary of numerator[i] / denominator[i]."""
    return summary([a / b for a, b in zip(numerator, denominator, strict=True)])
