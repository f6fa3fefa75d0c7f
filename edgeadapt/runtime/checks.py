"""Small questions about a caller's values."""

from __future__ import annotations

import math

import numpy as np


def is_whole(value: object, low: int, high: int | None = None) -> bool:
    """Return whether `value` is a whole number (not a bool) from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return False
    return low <= int(value) and (high is None or int(value) <= high)


def is_finite(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Return whether `value` is a finite number (not a bool) from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return math.isfinite(value) and bool(low <= value <= high)
