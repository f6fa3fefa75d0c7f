"""How many layers get 8 bits: as many as the user's limits on size and quality ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgeadapt.errors import QuantizeError
from edgeadapt.quality.quality import QualityRow
from edgeadapt.quantize.mixed import Mix

MARGIN = 0.9
"""Of a limit, what is aimed at: estimates are not exact."""
STEPS = 8
"""The groups are raised in at most about this many steps, and the answer is at most a step from fewer that break it."""
_LEAST = 1e-12
"""What a limit of nothing counts as where distances from it are compared."""


@dataclass(frozen=True)
class Worst:
    """The worst of base and adapters: mean_kl in nats, top1 the share of positions with the same most likely answer."""

    mean_kl: float
    top1: float

    @classmethod
    def of(cls, rows: Sequence[QualityRow]) -> Worst:
        """Return the worst of rows; those without such a figure break no limit here."""
        kls = [row.mean_kl for row in rows if row.mean_kl is not None]
        shares = [row.top1 for row in rows if row.top1 is not None]
        return cls(max(kls, default=0.0), min(shares, default=1.0))

    def __str__(self) -> str:
        return f"mean KL {self.mean_kl:.4g}, top-1 agreement {self.top1:.4g}"


@dataclass(frozen=True)
class Limits:
    """What the user asks for, None for any: the most bytes, the largest mean KL (nats), the smallest top-1 share."""

    max_bytes: int | None = None
    max_kl: float | None = None
    min_top1: float | None = None

    def keeps(self, worst: Worst) -> bool:
        """Tell whether the limits on quality are kept."""
        return (self.max_kl is None or worst.mean_kl <= self.max_kl) and (
            self.min_top1 is None or worst.top1 >= self.min_top1
        )

    def share(self, worst: Worst) -> float:
        """Return how much of what the limits allow is used, of that limit which is nearest to be broken, or most."""
        found = []
        if self.max_kl is not None:
            found.append(worst.mean_kl / max(self.max_kl, _LEAST))
        if self.min_top1 is not None:
            found.append((1 - worst.top1) / max(1 - self.min_top1, _LEAST))
        return max(found)

    def __str__(self) -> str:
        found = [] if self.max_kl is None else [f"mean KL divergence of at most {self.max_kl:g}"]
        found += [] if self.min_top1 is None else [f"top-1 agreement of at least {self.min_top1:g}"]
        return "a " + " and a ".join(found)


def fit(mix: Mix, limits: Limits, measure: Callable[[int], Worst]) -> int:
    """Return how many groups of `mix` to raise to 8 bits.

    With limits on quality the fewest that were found to keep them, by measuring some; without as many as the bytes let
    in.

    Args:
        mix: the groups in the order in which they are raised.
        limits: the user's.
        measure: how the model with so many groups raised answers.

    Raises:
        QuantizeError: naming the best that there is, if the limits cannot be kept.
    """
    most = _most(mix, limits.max_bytes)
    if limits.max_kl is None and limits.min_top1 is None:
        return most
    tried: dict[int, Worst] = {}
    step = -(-len(mix.groups) // STEPS)
    count = 0
    while not limits.keeps(tried.setdefault(count, measure(count))):
        if count == most:
            raise _unreachable(mix, tried, limits)
        shares = {count: limits.share(worst) for count, worst in tried.items()}
        count = min(most, max(_next(mix, shares), count + step))
    return _fewest(tried, step, limits, measure)


def _fewest(tried: dict[int, Worst], step: int, limits: Limits, measure: Callable[[int], Worst]) -> int:
    """Return the fewest groups found between what was tried last, which keeps the limits, and what was tried before."""
    *_, low, high = (-1, *sorted(tried))
    while low >= 0 and high - low > step:
        count = (low + high) // 2
        tried[count] = measure(count)
        if limits.keeps(tried[count]):
            high = count
        else:
            low = count
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


def _next(mix: Mix, shares: Mapping[int, float]) -> int:
    """Return the fewest groups that should keep the limits, on the line through the last two measured points."""
    counts = sorted(shares)[-2:]
    high, low = mix.loss(counts[0]), mix.loss(counts[-1])
    last = shares[counts[-1]]
    slope = (shares[counts[0]] - last) / (high - low) if high > low else last / max(low, 1e-30)
    slope = max(slope, 1e-30)
    wanted = low - (last - MARGIN) / slope
    return next((count for count in range(len(mix.groups) + 1) if mix.loss(count) <= wanted), len(mix.groups))


def _unreachable(mix: Mix, tried: Mapping[int, Worst], limits: Limits) -> QuantizeError:
    best = min(tried, key=lambda count: limits.share(tried[count]))
    within = "" if limits.max_bytes is None else f" within {limits.max_bytes} bytes"
    return QuantizeError(
        f"{limits} cannot be kept{within}: the best is {tried[best]} at {mix.bytes(best)} bytes, with {best} of "
        f"{len(mix.groups)} groups of layers in 8 bits",
        hint="allow more bytes or wider limits, give more samples (--calibrate), or use --quantize int8",
    )
