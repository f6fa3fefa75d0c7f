"""Medians and spreads of raw samples; ratios are of paired samples (the same round), not of medians."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import median, quantiles

RESAMPLES = 2000
CONFIDENCE = 0.95


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


def paired(above: Mapping[int, float], below: Mapping[int, float]) -> list[float]:
    """above[round] / below[round] of the rounds in which both were measured."""
    return [above[number] / below[number] for number in sorted(above.keys() & below.keys())]


def ratio(above: Mapping[int, float], below: Mapping[int, float]) -> dict[str, float | int | None] | None:
    """The median of the paired ratios with its bootstrap interval, None without a common round.

    `low` and `high` bound the median with 95 % confidence (percentile bootstrap over rounds, fixed seed); with one
    round they are None: one sample has no spread.
    """
    ratios = paired(above, below)
    if not ratios:
        return None
    low, high = bootstrap_interval(ratios) if len(ratios) > 1 else (None, None)
    return {"median": median(ratios), "low": low, "high": high, "n": len(ratios)}


def bootstrap_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The percentile bootstrap interval of the median."""
    rng = random.Random(0)  # noqa: S311 - a seed, not a secret
    medians = sorted(median(rng.choices(samples, k=len(samples))) for _ in range(RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    return medians[int(tail * RESAMPLES)], medians[int((1 - tail) * RESAMPLES) - 1]
