from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.quantize.blocks import round_to_nearest
from edgeadapt.quantize.gptq import invert, round_on_grid, round_with_feedback


def _layer(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight and the second moment of inputs that move together, as a transformer's do."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    inputs = random.standard_normal((4000, columns // 4)) @ random.standard_normal((columns // 4, columns))
    inputs += 0.3 * random.standard_normal(inputs.shape)
    return weight, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def _loss(weight: np.ndarray, rounded: np.ndarray, moment: np.ndarray) -> float:
    error = (weight - rounded).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", error, moment, error))


def test_the_factor_is_that_of_the_inverse():
    _, moment = _layer(4, 48)
    inverse = invert(moment, 0.01)
    assert (np.diff(np.diagonal(moment)[inverse.order]) <= 0).all()
    factor = inverse.factor.astype(np.float64)
    damped = (moment + 0.01 * np.trace(moment) / 48 * np.eye(48))[np.ix_(inverse.order, inverse.order)]
    assert np.allclose(factor.T @ factor @ damped, np.eye(48), atol=1e-3)
    assert np.array_equal(factor, np.triu(factor))


@pytest.mark.parametrize("columns", [128, 136])
def test_feedback_makes_up_for_most_of_the_output_error(columns):
    weight, moment = _layer(64, columns)
    nearest = round_to_nearest(weight, 4, 32, symmetric=False, search=True)
    fed_back = round_with_feedback(weight, invert(moment), 4, 32)
    assert _loss(weight, fed_back.dequantize(), moment) < 0.4 * _loss(weight, nearest.dequantize(), moment)
    assert fed_back.codes.shape == nearest.codes.shape
    assert fed_back.codes.max() <= 15


def test_inputs_that_are_independent_leave_rounding_to_nearest():
    weight = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    fed_back = round_with_feedback(weight, invert(np.eye(64, dtype=np.float32)), 4, 32)
    assert np.array_equal(fed_back.codes, round_to_nearest(weight, 4, 32, symmetric=False, search=True).codes)


def test_dead_inputs_and_equal_runs_are_harmless():
    weight, moment = _layer(8, 64)
    moment[:8] = moment[:, :8] = 0
    first, second = (round_with_feedback(weight, invert(moment), 4, 32) for _ in range(2))
    assert np.isfinite(first.dequantize()).all()
    assert np.array_equal(first.codes, second.codes)
    assert np.array_equal(first.scales, second.scales)
    zero = round_with_feedback(weight, invert(np.zeros_like(moment)), 4, 32)
    assert np.abs(zero.dequantize() - weight).max() < 0.5


def test_round_on_grid_gives_back_what_made_the_grid() -> None:
    rng = np.random.default_rng(7)
    matrix = rng.standard_normal((12, 100)).astype(np.float32)
    inputs = rng.standard_normal((400, 100)).astype(np.float32) @ rng.standard_normal((100, 100)).astype(np.float32)
    inverse = invert(inputs.T @ inputs / 400)
    fed = round_with_feedback(matrix, inverse, 4, 32)
    nearest = round_to_nearest(matrix, 8, 32, symmetric=True)

    np.testing.assert_array_equal(round_on_grid(matrix, fed, inverse).codes, fed.codes)
    np.testing.assert_array_equal(round_on_grid(matrix, nearest).codes, nearest.codes)


def test_round_on_grid_changes_only_the_codes() -> None:
    rng = np.random.default_rng(8)
    matrix = rng.standard_normal((6, 64)).astype(np.float32)
    blocks = round_to_nearest(matrix, 4, 32, symmetric=False)
    changed = matrix.copy()
    changed[2, 5] += 3 * blocks.scales[2, 0]

    result = round_on_grid(changed, blocks)

    assert np.argwhere(result.codes != blocks.codes).tolist() == [[2, 0, 5]]
    np.testing.assert_array_equal(result.scales, blocks.scales)
    np.testing.assert_array_equal(result.zero_points, blocks.zero_points)
