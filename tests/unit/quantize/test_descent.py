from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.quantize.blocks import Blocks, round_to_nearest
from edgeadapt.quantize.descent import descend
from edgeadapt.quantize.gptq import invert, round_on_grid, round_with_feedback


def layer(rows: int = 48, columns: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a weight, the same with a low-rank change, and the second moment of correlated inputs."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    change = 0.003 * random.standard_normal((rows, 4)) @ random.standard_normal((4, columns))
    inputs = random.standard_normal((1000, columns)) @ random.standard_normal((columns, columns)) / np.sqrt(columns)
    return weight, (weight + change).astype(np.float32), (inputs.T @ inputs / 1000).astype(np.float32)


def error(blocks: Blocks, weight: np.ndarray, moment: np.ndarray) -> float:
    difference = blocks.dequantize().astype(np.float64) - weight
    return float(np.einsum("ij,jk,ik->", difference, moment, difference))


@pytest.mark.parametrize("bits", [4, 8])
def test_each_pass_makes_the_error_smaller(bits):
    weight, _, moment = layer()
    start = round_to_nearest(weight, bits, 32, symmetric=False)
    errors = [error(descend(weight, start, moment, passes=passes, damping=0), weight, moment) for passes in range(4)]
    assert errors[0] == error(start, weight, moment)
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.7 * errors[0]


def test_no_single_code_can_do_better_in_the_end():
    weight, _, moment = layer(6, 40)
    done = descend(weight, round_to_nearest(weight, 4, 32, symmetric=False), moment, passes=50, damping=0)
    least = error(done, weight, moment)
    for row, column in np.ndindex(weight.shape):
        for step in (-1, 1):
            codes = done.codes.copy()
            place = row, column // 32, column % 32
            if 0 <= int(codes[place]) + step <= 15:
                codes[place] = int(codes[place]) + step
                other = Blocks(codes, done.scales, done.zero_points, 4, 40)
                assert error(other, weight, moment) >= least * (1 - 1e-5)


def test_from_the_base_s_codes_few_change_and_the_error_is_that_of_rounding_anew():
    weight, changed, moment = layer(96, 256)
    base = round_with_feedback(weight, invert(moment), 4, 32)
    anew = round_on_grid(changed, base, invert(moment))
    found = descend(changed, base, moment)
    assert np.mean(found.codes != base.codes) < 0.5 * np.mean(anew.codes != base.codes)
    assert error(found, changed, moment) < 1.02 * error(anew, changed, moment)
    assert error(found, changed, moment) < error(base, changed, moment)  # the adapter is not lost
    assert found.scales is base.scales
    np.testing.assert_array_equal(found.codes, descend(changed, base, moment).codes)


def test_inputs_that_are_never_seen_are_harmless():
    weight, changed, moment = layer()
    base = round_to_nearest(weight, 4, 32, symmetric=False)
    moment[:, 7] = moment[7] = 0
    assert np.isfinite(descend(changed, base, moment).dequantize()).all()
    assert np.isfinite(descend(changed, base, np.zeros_like(moment)).dequantize()).all()
