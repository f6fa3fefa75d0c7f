"""Numbers in blocks: integer codes with one scale and one zero point per run of weights along a row's inputs.

A weight is `(code - zero_point) * scale`. The memory layout is that of com.microsoft::MatMulNBits and
GatherBlockQuantized: codes uint8[out, blocks, block_size], two 4-bit codes a byte, the first in the low half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Codes = NDArray[np.uint8]

ROWS_AT_ONCE = 4096
"""Rows of a matrix that are rounded together, so that a head of 50 000 rows needs no second float copy."""


@dataclass(frozen=True)
class Blocks:
    """A matrix float32[out, in] in blocks.

    codes: uint8[out, blocks, block_size], one code a byte; the last block is filled up with the zero point
    scales: float32[out, blocks]
    zero_points: uint8[out, blocks], or None where all are 2^(bits - 1)
    """

    codes: Codes
    scales: Float
    zero_points: Codes | None
    bits: int
    in_features: int

    @property
    def block_size(self) -> int:
        """Weights that share a scale."""
        return int(self.codes.shape[2])

    def dequantize(self) -> Float:
        """Return float32[out, in], what the codes stand for."""
        middle = np.float32(2 ** (self.bits - 1))
        zeros = middle if self.zero_points is None else self.zero_points[:, :, None].astype(np.float32)
        values = (self.codes.astype(np.float32) - zeros) * self.scales[:, :, None]
        return np.ascontiguousarray(values.reshape(len(values), -1)[:, : self.in_features])

    def packed_codes(self) -> Codes:
        """Return uint8[out, blocks, block_size * bits / 8], MatMulNBits' B."""
        return pack(self.codes, self.bits)

    def packed_zero_points(self) -> Codes | None:
        """Return uint8[out, ceil(blocks * bits / 8)], or None."""
        return None if self.zero_points is None else pack(self.zero_points, self.bits)


def pack(codes: Codes, bits: int) -> Codes:
    """Return codes uint8[..., n], one a byte, as uint8[..., ceil(n * bits / 8)]."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    return np.ascontiguousarray(codes[..., ::2] | (codes[..., 1::2] << 4))


def unpack(packed: Codes, bits: int, count: int) -> Codes:
    """Return codes uint8[..., count], one a byte, of what `pack` made of them."""
    if bits == 8:
        return packed
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return np.ascontiguousarray(codes[..., :count])


def block_count(in_features: int, block_size: int) -> int:
    """Return how many blocks a row of `in_features` weights has."""
    return -(-in_features // block_size)


def stored_bytes(shape: Sequence[int], bits: int, block_size: int, *, symmetric: bool) -> int:
    """Return what a file holds for a matrix [out, in] in blocks: codes, float32 scales, zero points."""
    rows, width = shape
    blocks = block_count(width, block_size)
    zeros = 0 if symmetric else rows * -(-blocks * bits // 8)
    return rows * blocks * (block_size * bits // 8 + 4) + zeros


def in_groups(matrix: Float, block_size: int) -> Float:
    """Return `matrix` float32[out, in] as float32[out, blocks, block_size], filled up with zeros."""
    rows, width = matrix.shape
    blocks = block_count(width, block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :width] = matrix
    return padded.reshape(rows, blocks, block_size)


def round_to_nearest(matrix: Float, bits: int, block_size: int, *, symmetric: bool, search: bool = False) -> Blocks:
    """Return `matrix` float32[out, in] in blocks, each weight rounded by itself.

    Args:
        matrix: float32[out, in].
        bits: 4 or 8.
        block_size: weights along a row that share a scale.
        symmetric: no zero points: 0 is code 2^(bits - 1).
        search: try narrower ranges too and keep the one with the least squared error per block.
    """
    parts = [
        _round_rows(matrix[first : first + ROWS_AT_ONCE], bits, block_size, symmetric=symmetric, search=search)
        for first in range(0, len(matrix), ROWS_AT_ONCE)
    ]
    codes, scales, zeros = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Blocks(codes, scales, None if symmetric else zeros, bits, matrix.shape[1])


def _round_rows(
    rows: Float, bits: int, block_size: int, *, symmetric: bool, search: bool
) -> tuple[Codes, Float, Codes]:
    groups = in_groups(rows, block_size)
    scales, zeros = grid(groups, bits, symmetric=symmetric, search=search)
    return encode(groups, scales, zeros, bits), scales, zeros.astype(np.uint8)


def encode(groups: Float, scales: Float, zeros: Float, bits: int) -> Codes:
    """Return the nearest codes uint8[..., n] of groups float32[..., n] on a grid float32[...]."""
    codes = np.rint(groups / scales[..., None]) + zeros[..., None]
    return np.asarray(np.clip(codes, 0, 2**bits - 1), np.uint8)


def grid(groups: Float, bits: int, *, symmetric: bool, search: bool = False) -> tuple[Float, Float]:
    """Return scales and zero points float32[...] (whole numbers) for groups float32[..., n].

    Args:
        groups: the weights of each block.
        bits: 4 or 8.
        symmetric: zero points are 2^(bits - 1).
        search: among ranges narrowed in steps of 2.5 %, take the one with the least squared error.
    """
    low = np.minimum(groups.min(-1), 0)
    high = np.maximum(groups.max(-1), 0)
    scales, zeros = _grid_of_range(low, high, bits, symmetric=symmetric)
    if not search:
        return scales, zeros
    least = _error(groups, scales, zeros, bits)
    for percent in range(975, 600, -25):
        shrink = np.float32(percent / 1000)
        trial_scales, trial_zeros = _grid_of_range(low * shrink, high * shrink, bits, symmetric=symmetric)
        error = _error(groups, trial_scales, trial_zeros, bits)
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(scales, trial_scales, where=better)
        np.copyto(zeros, trial_zeros, where=better)
    return scales, zeros


def _grid_of_range(low: Float, high: Float, bits: int, *, symmetric: bool) -> tuple[Float, Float]:
    top = np.float32(2**bits - 1)
    if symmetric:
        # The largest weight by magnitude lands on code 0, which is one step farther out than the last code.
        extreme = np.where(-low >= high, low, high)
        half = np.float32(2 ** (bits - 1))
        largest = np.abs(extreme)
        scales = _nonzero(-extreme / half if bits < 8 else largest / (half - 1))
        return scales, np.full(low.shape, half, np.float32)
    scales = _nonzero((high - low) / top)
    return scales, np.clip(np.rint(-low / scales), 0, top)


def _nonzero(scales: NDArray[Any]) -> Float:
    """Replace the scale of a block of zeros, or one that is too small to divide by."""
    return np.asarray(np.where(np.abs(scales) < np.float32(1e-30), np.float32(1), scales), np.float32)


def _error(groups: Float, scales: Float, zeros: Float, bits: int) -> Float:
    codes = groups / scales[..., None]
    np.rint(codes, out=codes)
    np.clip(codes, -zeros[..., None], (2**bits - 1) - zeros[..., None], out=codes)
    codes *= scales[..., None]
    codes -= groups
    np.square(codes, out=codes)
    return np.asarray(codes.sum(-1), np.float32)
