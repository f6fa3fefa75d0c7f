"""How many layers get 8 bits."""

from __future__ import annotations

import math

import pytest

from edgeadapt.errors import QuantizeError
from edgeadapt.quality.fit import fit
from edgeadapt.quantize.mixed import Group, Mix

MIX = Mix(tuple(Group((f"m{i}",), loss=0.1 / 2**i, extra_bytes=100) for i in range(16)), least_bytes=1000)


def _measured(count: int) -> float:
    """Return what the estimates say, times 1.5, and the loss of 8 bits."""
    return 1.5 * MIX.loss(count) + 0.004


def test_bytes_alone_are_used_up() -> None:
    def never(_count: int) -> float:
        raise AssertionError

    assert fit(MIX, max_bytes=1000, max_kl=None, measure=never) == 0
    assert fit(MIX, max_bytes=1399, max_kl=None, measure=never) == 3
    assert fit(MIX, max_bytes=10**9, max_kl=None, measure=never) == 16


def test_a_limit_on_the_divergence_is_kept_with_few_groups_and_few_measurements() -> None:
    tried: list[int] = []

    def measure(count: int) -> float:
        tried.append(count)
        return _measured(count)

    count = fit(MIX, max_bytes=None, max_kl=0.03, measure=measure)

    fewest = next(count for count in range(17) if _measured(count) <= 0.03)
    assert fewest <= count <= fewest + 2
    assert _measured(count) <= 0.03
    assert len(tried) <= 3
    assert fit(MIX, max_bytes=None, max_kl=0.5, measure=measure) == 0


@pytest.mark.parametrize("max_kl", [0.2, 0.1, 0.05, 0.02, 0.01])
def test_where_the_estimates_are_far_off_the_fewest_are_looked_for(max_kl: float) -> None:
    mix = Mix(tuple(Group((f"m{i}",), loss=1 / (i + 1), extra_bytes=100) for i in range(120)), least_bytes=1000)
    tried: list[int] = []

    def measured(count: int) -> float:
        return 0.24 * math.exp(-((count / 64) ** 2))

    def measure(count: int) -> float:
        tried.append(count)
        return measured(count)

    count = fit(mix, max_bytes=None, max_kl=max_kl, measure=measure)
    fewest = next(count for count in range(121) if measured(count) <= max_kl)
    assert fewest <= count <= fewest + 15
    assert len(tried) == len(set(tried)) <= 8


def test_no_divergence_at_all_can_be_asked_for() -> None:
    assert fit(MIX, max_bytes=None, max_kl=0.0, measure=lambda count: 0.0 if count > 7 else 0.1) in {8, 9}


def test_both_limits_that_go_together() -> None:
    count = fit(MIX, max_bytes=1600, max_kl=0.03, measure=_measured)
    assert MIX.bytes(count) <= 1600
    assert _measured(count) <= 0.03


HINT = "allow more bytes or a larger KL divergence, give more samples (--calibrate), or use --quantize int8"


@pytest.mark.parametrize(
    ("limits", "message", "hint"),
    [
        (
            {"max_bytes": 999, "max_kl": None},
            "max_bytes is 999, and the weights take 1000 with every linear layer in 4 bits",
            "allow at least 1000 bytes",
        ),
        (
            {"max_bytes": 1250, "max_kl": 0.03},
            (
                "the mean KL divergence cannot be kept at 0.03 within 1250 bytes: "
                "the best is 0.079 at 1200 bytes, with 2 of 16 groups of layers in 8 bits"
            ),
            HINT,
        ),
        (
            {"max_bytes": None, "max_kl": 0.001},
            (
                "the mean KL divergence cannot be kept at 0.001: "
                "the best is 0.004 at 2600 bytes, with 16 of 16 groups of layers in 8 bits"
            ),
            HINT,
        ),
    ],
)
def test_limits_that_cannot_be_kept_name_the_best(limits: dict[str, float | None], message: str, hint: str) -> None:
    with pytest.raises(QuantizeError) as caught:
        fit(MIX, measure=_measured, **limits)
    assert str(caught.value) == f"{message}\nHint: {hint}"
