"""How many layers get 8 bits."""

from __future__ import annotations

import math

import pytest

from edgeadapt.errors import QuantizeError
from edgeadapt.quality.fit import Limits, Worst, fit
from edgeadapt.quantize.mixed import Group, Mix

MIX = Mix(tuple(Group((f"m{i}",), loss=0.1 / 2**i, extra_bytes=100) for i in range(16)), least_bytes=1000)


def _measured(count: int) -> Worst:
    """Return what the estimates say, times 1.5, and the loss of 8 bits; the top-1 share falls with the divergence."""
    divergence = 1.5 * MIX.loss(count) + 0.004
    return Worst(divergence, 1 - divergence)


def test_bytes_alone_are_used_up() -> None:
    def never(_count: int) -> Worst:
        raise AssertionError

    assert fit(MIX, Limits(max_bytes=1000), never) == 0
    assert fit(MIX, Limits(max_bytes=1399), never) == 3
    assert fit(MIX, Limits(max_bytes=10**9), never) == 16


@pytest.mark.parametrize("limits", [Limits(max_kl=0.03), Limits(min_top1=0.97), Limits(max_kl=0.1, min_top1=0.97)])
def test_a_limit_on_quality_is_kept_with_few_groups_and_few_measurements(limits: Limits) -> None:
    tried: list[int] = []

    def measure(count: int) -> Worst:
        tried.append(count)
        return _measured(count)

    count = fit(MIX, limits, measure)

    fewest = next(count for count in range(17) if limits.keeps(_measured(count)))
    assert fewest <= count <= fewest + 2
    assert limits.keeps(_measured(count))
    assert len(tried) <= 3
    assert fit(MIX, Limits(max_kl=0.5), measure) == 0


@pytest.mark.parametrize("max_kl", [0.2, 0.1, 0.05, 0.02, 0.01])
def test_where_the_estimates_are_far_off_the_fewest_are_looked_for(max_kl: float) -> None:
    mix = Mix(tuple(Group((f"m{i}",), loss=1 / (i + 1), extra_bytes=100) for i in range(120)), least_bytes=1000)
    tried: list[int] = []

    def measured(count: int) -> float:
        return 0.24 * math.exp(-((count / 64) ** 2))

    def measure(count: int) -> Worst:
        tried.append(count)
        return Worst(measured(count), 1.0)

    count = fit(mix, Limits(max_kl=max_kl), measure)
    fewest = next(count for count in range(121) if measured(count) <= max_kl)
    assert fewest <= count <= fewest + 15
    assert len(tried) == len(set(tried)) <= 8


def test_no_divergence_at_all_can_be_asked_for() -> None:
    assert fit(MIX, Limits(max_kl=0.0), lambda count: Worst(0.0 if count > 7 else 0.1, 1.0)) in {8, 9}
    assert fit(MIX, Limits(min_top1=1.0), lambda count: Worst(0.0, 1.0 if count > 7 else 0.9)) in {8, 9}


def test_of_two_limits_the_harder_one_decides() -> None:
    easy = fit(MIX, Limits(max_kl=0.1), _measured)
    assert fit(MIX, Limits(max_kl=0.1, min_top1=0.5), _measured) == easy
    harder = Limits(max_kl=0.1, min_top1=0.985)
    assert easy < (count := fit(MIX, harder, _measured))
    assert harder.keeps(_measured(count))


def test_both_limits_that_go_together() -> None:
    limits = Limits(max_bytes=1600, max_kl=0.03)
    count = fit(MIX, limits, _measured)
    assert MIX.bytes(count) <= 1600
    assert limits.keeps(_measured(count))


HINT = "allow more bytes or wider limits, give more samples (--calibrate), or use --quantize int8"


@pytest.mark.parametrize(
    ("limits", "message", "hint"),
    [
        (
            Limits(max_bytes=999),
            "max_bytes is 999, and the weights take 1000 with every linear layer in 4 bits",
            "allow at least 1000 bytes",
        ),
        (
            Limits(max_bytes=1250, max_kl=0.03),
            (
                "a mean KL divergence of at most 0.03 cannot be kept within 1250 bytes: the best is mean KL 0.079, "
                "top-1 agreement 0.921 at 1200 bytes, with 2 of 16 groups of layers in 8 bits"
            ),
            HINT,
        ),
        (
            Limits(max_kl=0.001),
            (
                "a mean KL divergence of at most 0.001 cannot be kept: the best is mean KL 0.004, "
                "top-1 agreement 0.996 at 2600 bytes, with 16 of 16 groups of layers in 8 bits"
            ),
            HINT,
        ),
        (
            Limits(max_kl=1.0, min_top1=0.9999),
            (
                "a mean KL divergence of at most 1 and a top-1 agreement of at least 0.9999 cannot be kept: the best "
                "is mean KL 0.004, top-1 agreement 0.996 at 2600 bytes, with 16 of 16 groups of layers in 8 bits"
            ),
            HINT,
        ),
    ],
)
def test_limits_that_cannot_be_kept_name_the_best(limits: Limits, message: str, hint: str) -> None:
    with pytest.raises(QuantizeError) as caught:
        fit(MIX, limits, _measured)
    assert str(caught.value) == f"{message}\nHint: {hint}"
