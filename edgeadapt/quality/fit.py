"""How many layers get 8 bits: as many as the user's limits on size and quality ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgeadapt.errors import QuantizeError
from edgeadapt.quantize.mixed import Mix

MARGIN = 0.9
"""Of the limit, what is aimed at: estimates are not exact."""
STEPS = 8
"""The groups are raised in at most about this many steps, and the answer is at most a step from fewer that break it."""


def fit(mix: Mix, *, max_bytes: int | None, max_kl: float | None, measure: Callable[[int], float]) -> int:
    """Return how many groups of `mix` to raise to 8 bits.

    With `max_kl` the fewest that were found to keep it, by measuring some; without it as many as `max_bytes` lets in.

    Args:
        mix: the groups in the order in which they are raised.
        max_bytes: the most that the weights may take, or None.
        max_kl: the largest mean KL divergence in nats, or None.
        measure: the mean KL divergence of the model with so many groups raised.

    Raises:
        QuantizeError: naming the best that there is, if the limits cannot be kept.
    """
    most = _most(mix, max_bytes)
    if max_kl is None:
        return most
    tried: dict[int, float] = {}
    step = -(-len(mix.groups) // STEPS)
    count = 0
    while tried.setdefault(count, measure(count)) > max_kl:
        if count == most:
            raise _unreachable(mix, tried, max_bytes, max_kl)
        count = min(most, max(_next(mix, tried, max_kl), count + step))
    return _fewest(tried, step, max_kl, measure)


def _fewest(tried: dict[int, float], step: int, max_kl: float, measure: Callable[[int], float]) -> int:
    """Return the fewest groups found between what was tried last, which keeps the limit, and what was tried before."""
    *_, low, high = (-1, *sorted(tried))
    while low >= 0 and high - low > step:
        count = (low + high) // 2
        tried[count] = measure(count)
        if tried[count] > max_kl:
            low = count
        else:
            high = count
    return high


def _most(mix: Mix, max_bytes: int | None) -> int:
    counts = range(len(mix.groups), -1, -1)
    most = next((count for count in counts if max_bytes is None or mix.bytes(count) <= max_bytes), None)
    if most is None:
        raise QuantizeError(
            f"max_bytes is {max_bytes}, and the weights take {mix.bytes(0)} with every linear layer in 4 bits",
            hint=f"allow at least {mix.bytes(0)} bytes",
        )
    return most


def _next(mix: Mix, tried: Mapping[int, float], max_kl: float) -> int:
    """Return the fewest groups that should keep the limit, on the line through the last two measured points."""
    counts = sorted(tried)[-2:]
    high, low = mix.loss(counts[0]), mix.loss(counts[-1])
    slope = (tried[counts[0]] - tried[counts[-1]]) / (high - low) if high > low else tried[counts[-1]] / max(low, 1e-30)
    slope = max(slope, 1e-30)
    wanted = low - (tried[counts[-1]] - MARGIN * max_kl) / slope
    return next((count for count in range(len(mix.groups) + 1) if mix.loss(count) <= wanted), len(mix.groups))


def _unreachable(mix: Mix, tried: Mapping[int, float], max_bytes: int | None, max_kl: float) -> QuantizeError:
    best = min(tried, key=lambda count: tried[count])
    within = "" if max_bytes is None else f" within {max_bytes} bytes"
    return QuantizeError(
        f"the mean KL divergence cannot be kept at {max_kl:g}{within}: the best is {tried[best]:.4g} at "
        f"{mix.bytes(best)} bytes, with {best} of {len(mix.groups)} groups of layers in 8 bits",
        hint="allow more bytes or a larger KL divergence, give more samples (--calibrate), or use --quantize int8",
    )
