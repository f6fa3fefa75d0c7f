from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.quantize.blocks import Blocks, pack, round_to_nearest
from edgeadapt.quantize.channels import round_channels


def _matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 70])
def test_every_weight_lands_within_half_a_step(bits, symmetric, columns):
    matrix = _matrix(9, columns)
    blocks = round_to_nearest(matrix, bits, 32, symmetric=symmetric)
    steps = np.repeat(np.abs(blocks.scales), 32, axis=1)[:, :columns]
    error = np.abs(blocks.dequantize() - matrix)
    # The farther end of a symmetric 4-bit range is clipped by up to one step; a rounded zero point costs half a step.
    allowed = 1.001 if (symmetric and bits == 4) or not symmetric else 0.501
    assert (error <= allowed * steps).all()
    assert error.max() > 0.2 * steps.min()
    assert blocks.codes.shape == (9, -(-columns // 32), 32)
    assert (blocks.zero_points is None) == symmetric


def test_fewer_bits_mean_larger_errors():
    matrix = _matrix(16, 128)
    four, eight = (round_to_nearest(matrix, bits, 32, symmetric=False).dequantize() for bits in (4, 8))
    assert np.abs(four - matrix).mean() > 10 * np.abs(eight - matrix).mean() > 0


def test_a_matrix_on_the_grid_is_kept_exactly():
    codes = np.random.default_rng(1).integers(0, 16, (5, 64))
    codes[:, 0], codes[:, 1], codes[:, 32], codes[:, 33] = 0, 15, 0, 15
    matrix = ((codes - 6) * 0.25).astype(np.float32)
    assert np.array_equal(round_to_nearest(matrix, 4, 32, symmetric=False).dequantize(), matrix)


def test_the_search_lowers_the_squared_error():
    matrix = _matrix(32, 256) ** 3
    plain, searched = (
        ((round_to_nearest(matrix, 4, 32, symmetric=False, search=search).dequantize() - matrix) ** 2).sum()
        for search in (False, True)
    )
    assert searched < 0.98 * plain


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zero(bits):
    matrix = np.zeros((3, 40), np.float32)
    matrix[1, :3] = 1
    found = round_to_nearest(matrix, bits, 32, symmetric=bits == 8, search=True).dequantize()
    assert np.isfinite(found).all()
    assert not found[0].any()
    assert not found[1, 32:].any()


def test_many_rows_are_rounded_like_few():
    matrix = _matrix(5000, 32)
    whole = round_to_nearest(matrix, 8, 32, symmetric=True)
    assert np.array_equal(whole.codes[4500:], round_to_nearest(matrix[4500:], 8, 32, symmetric=True).codes)


def test_two_codes_share_a_byte_the_first_in_the_low_half():
    assert pack(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack(np.array([[1, 2, 3]], np.uint8), 8).tolist() == [[1, 2, 3]]


def test_zero_points_are_packed_like_codes():
    blocks = Blocks(np.zeros((1, 3, 16), np.uint8), np.ones((1, 3), np.float32), np.array([[5, 6, 7]], np.uint8), 4, 48)
    assert blocks.packed_zero_points().tolist() == [[0x65, 0x07]]
    assert blocks.packed_codes().shape == (1, 3, 8)


def test_channels_have_scales_of_their_own():
    weight = _matrix(4, 18).reshape(4, 2, 3, 3) * np.array([1, 10, 100, 0], np.float32)[:, None, None, None]
    codes, scales = round_channels(weight)
    assert scales.shape == (4, 1, 1, 1)
    assert codes.dtype == np.int8
    assert (np.abs(codes * scales - weight) <= 0.5001 * scales).all()
    assert not (codes * scales)[3].any()
