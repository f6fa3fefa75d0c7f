"""Weights in effect to the cheapest updates that give them."""

from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.adapters.adapter import Effective, ResolvedAdapter, SiteUpdate, TargetModule
from edgeadapt.adapters.factor import dense_sites, factor

GENERATOR = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def module(kind: str, weight: np.ndarray, bias: np.ndarray | None = None, scale: float | None = None) -> TargetModule:
    turned = kind in ("conv1d", "embedding")
    return TargetModule(
        path="m",
        type=kind,  # type: ignore[arg-type]
        class_name="M",
        weight_shape=weight.shape,
        in_features=weight.shape[0] if turned else weight.shape[1],
        out_features=weight.shape[1] if turned else weight.shape[0],
        has_bias=bias is not None,
        digest="",
        output_scale=scale,
        weight=lambda: weight,
        bias=None if bias is None else lambda: bias,
    )


def applied(kind: str, weight: np.ndarray, bias: np.ndarray | None, update: SiteUpdate) -> tuple[np.ndarray, ...]:
    """Return the weight and bias that an update makes, in torch's layout."""
    change = np.zeros(weight.shape)
    if update.a is not None and update.b is not None:
        a, b = update.a.astype(np.float64), update.b.astype(np.float64)
        if kind == "conv2d":
            change = np.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
        else:
            change = (a @ b).T if kind == "linear" else a @ b
    if update.input_gain is not None:
        weight = weight * (update.input_gain.astype(np.float64) if kind == "linear" else update.input_gain[:, None])
    gain = np.ones(1) if update.gain is None else update.gain.astype(np.float64)
    rows = gain.reshape(-1, *[1] * (weight.ndim - 1)) if kind in ("linear", "conv2d") else gain
    old = 0.0 if bias is None else bias
    return (weight + change) * rows, old * gain + (0.0 if update.offset is None else update.offset)


def check(kind: str, weight: np.ndarray, bias: np.ndarray | None, now: Effective) -> SiteUpdate:
    update = factor(module(kind, weight, bias), now)
    assert update is not None
    found, offset = applied(kind, weight, bias, update)
    assert np.abs(found - now.weight).max() <= 1e-6 * np.abs(now.weight).max()
    assert np.abs(offset - (0.0 if now.bias is None else now.bias)).max() <= 1e-6
    return update


SHAPES = {"linear": (40, 60), "conv1d": (60, 40), "embedding": (300, 24), "conv2d": (20, 12, 3, 3)}


@pytest.mark.parametrize("kind", SHAPES)
def test_the_same_weight_is_no_update(kind: str) -> None:
    weight = normal(*SHAPES[kind])
    assert factor(module(kind, weight), Effective(weight.copy())) is None
    assert factor(module(kind, weight), Effective(weight * np.float32(1 + 1e-7))) is None


def test_a_new_bias_is_an_offset() -> None:
    weight, bias, new = normal(40, 60), normal(40), normal(40)
    for old in (bias, None):
        update = check("linear", weight, old, Effective(weight.copy(), new))
        assert (update.a, update.b, update.gain) == (None, None, None)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scaled_outputs_are_a_gain(kind: str, *, with_bias: bool) -> None:
    weight = normal(*SHAPES[kind])
    outputs = weight.shape[1] if kind == "conv1d" else weight.shape[0]
    gain, bias = normal(outputs), normal(outputs) if with_bias else None
    scaled = weight * (gain if kind == "conv1d" else gain.reshape(-1, *[1] * (weight.ndim - 1)))
    update = check(kind, weight, bias, Effective(scaled, None if bias is None else bias * gain))
    assert update.a is None
    assert update.offset is None
    unscaled_bias = check("linear", normal(4, 6), normal(4), Effective(normal(4, 6), normal(4)))
    assert unscaled_bias.offset is not None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_scaled_inputs_are_an_input_gain(kind: str) -> None:
    """IA3 at feed-forward modules; a bias of its own beside it, and a gain of all as one of the outputs."""
    weight, bias = normal(*SHAPES[kind]), normal(40)
    gain = normal(60)
    scaled = weight * (gain if kind == "linear" else gain[:, None])
    update = check(kind, weight, bias, Effective(scaled, bias))
    assert list(update.terms) == ["input_gain"]
    assert dense_sites(ResolvedAdapter("a", "k", {"m": update}, {})) == []
    assert list(check(kind, weight, bias, Effective(scaled, normal(40))).terms) == ["offset", "input_gain"]
    assert list(check(kind, weight, None, Effective(weight * np.float32(1.5))).terms) == ["gain"]


@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
def test_other_modules_have_no_input_gain(kind: str) -> None:
    weight = normal(*SHAPES[kind])
    gain = normal(len(weight))[:, None] if kind == "embedding" else normal(12)[:, None, None]
    assert check(kind, weight, None, Effective(weight * gain)).rank > 0


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_a_low_rank_is_found(kind: str, rank: int, size: float) -> None:
    shape = SHAPES[kind]
    weight = normal(*shape)
    inner = int(np.prod(shape[1:]))
    change = (normal(shape[0], rank) @ normal(rank, inner)).reshape(shape) * np.float32(size)
    update = check(kind, weight, None, Effective(weight + change))
    assert update.rank == rank
    assert update.gain is None


def test_a_rank_beyond_the_sketch_is_found() -> None:
    weight = normal(150, 200)
    update = check("linear", weight, None, Effective(weight + normal(150, 90) @ normal(90, 200)))
    assert update.rank == 90


def test_changed_rows_stay_alone() -> None:
    """Trained tokens: every other row of the table is the base's, bit for bit."""
    weight = normal(300, 24)
    new = weight.copy()
    new[[5, 17, 200]] = normal(3, 24)
    update = check("embedding", weight, None, Effective(new))
    assert update.rank == 3
    assert update.a is not None
    assert sorted(np.flatnonzero(update.a.any(axis=1))) == [5, 17, 200]


def test_an_embedding_that_scales_its_rows() -> None:
    weight, change = normal(300, 24), normal(300, 2) @ normal(2, 24)
    update = factor(module("embedding", weight, scale=8.0), Effective(weight + change))
    assert update is not None
    assert update.a is not None
    assert update.b is not None
    np.testing.assert_allclose(update.a @ update.b, 8 * change, atol=1e-4)


@pytest.mark.parametrize(("kind", "rank"), [("linear", 40), ("conv1d", 40), ("embedding", 24), ("conv2d", 20)])
def test_any_other_change_costs_as_much_as_the_base(kind: str, rank: int) -> None:
    weight = normal(*SHAPES[kind])
    update = check(kind, weight, None, Effective(normal(*SHAPES[kind])))
    assert update.rank == rank
    assert dense_sites(ResolvedAdapter("a", "k", {"m": update}, {})) == ["m"]


def test_a_low_rank_costs_less_than_the_base() -> None:
    weight = normal(40, 60)
    update = check("linear", weight, None, Effective(weight + normal(40, 4) @ normal(4, 60)))
    assert dense_sites(ResolvedAdapter("a", "k", {"m": update, "bias": SiteUpdate(offset=normal(3))}, {})) == []
