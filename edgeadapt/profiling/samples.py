"""Raw measurements and what is derived from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np


def timed(call: Callable[[], Any]) -> float:
    """Return how long `call` takes, in seconds of wall clock."""
    start = perf_counter()
    call()
    return perf_counter() - start


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated between the two nearest samples.

    Raises:
        ValueError: if there are no samples.
    """
    if not samples:
        raise ValueError("there are no samples")
    return float(np.percentile(np.asarray(samples, np.float64), percent))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of samples that were taken next to each other.

    Raises:
        ValueError: if there are no pairs, or the lengths differ.
    """
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return percentile(ratios, 50)
