"""Error-aware rounding: each weight's rounding error is made up for by the weights that are not yet rounded.

The algorithm is GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1): the columns of W are rounded one after the other;
with H = E[x x^T] and U the upper Cholesky factor of its inverse, the error of column j moves column k > j by
-error / U[j, j] * U[j, k]. The inputs with the largest second moment come first, while there are many others left to
make up for them; scales and zero points are those of the block as it was (GPTQ's "act order" with "static groups").
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeadapt.quantize.blocks import Blocks, Codes, Float, encode, grid, in_groups

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean: inputs that the calibration text never excites stay harmless."""
COLUMNS_AT_ONCE = 64
"""Columns after which the errors reach the rest of the matrix, in one product instead of many small ones."""


@dataclass(frozen=True)
class Inverse:
    """What rounding needs of a second moment.

    order: int64[in], columns in the order in which they are rounded
    factor: float32[in, in], upper triangular, U^T U = H^-1 for H in that order
    """

    order: NDArray[np.intp]
    factor: Float


def invert(moment: Float, damping: float = DAMPING) -> Inverse:
    """Return the inverse factor of moment + damping * mean(diagonal) * I, columns by falling diagonal.

    Reversing both axes turns the lower Cholesky factor into an upper one: H = R R^T, so H^-1 = R^-T R^-1 and U = R^-1.

    Raises:
        numpy.linalg.LinAlgError: if the damped moment is not positive definite.
    """
    order = np.argsort(-np.diagonal(moment), kind="stable")
    damped = moment[np.ix_(order, order)].astype(np.float64)
    mean = float(np.trace(damped)) / len(damped)
    damped[np.diag_indices_from(damped)] += damping * mean if mean > 0 else 1.0
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return Inverse(order, np.asarray(np.triu(np.linalg.inv(lower[::-1, ::-1])), np.float32))


def round_with_feedback(matrix: Float, inverse: Inverse, bits: int, block_size: int) -> Blocks:
    """Return `matrix` float32[out, in] in blocks with zero points, rounded column by column with error feedback.

    Args:
        matrix: float32[out, in].
        inverse: of the second moment of the layer's input, from `invert`.
        bits: 4 or 8.
        block_size: weights along a row that share a scale.
    """
    scales, zeros = grid(in_groups(matrix, block_size), bits, symmetric=False, search=True)
    codes = _feed_back(matrix, inverse, scales, zeros, bits=bits, block_size=block_size)
    return Blocks(codes, scales, zeros.astype(np.uint8), bits, matrix.shape[1])


def round_on_grid(matrix: Float, blocks: Blocks, inverse: Inverse | None = None) -> Blocks:
    """Return `matrix` float32[out, in] on the scales and zero points that `blocks` has; only the codes are new.

    Args:
        matrix: of the shape that `blocks` stands for.
        blocks: whose grid it is.
        inverse: of the second moment of the layer's input, for error feedback; None rounds each weight by itself.
    """
    bits, size = blocks.bits, blocks.block_size
    middle = np.full(blocks.scales.shape, 2 ** (bits - 1), np.float32)
    zeros = middle if blocks.zero_points is None else blocks.zero_points.astype(np.float32)
    if inverse is None:
        codes = encode(in_groups(matrix, size), blocks.scales, zeros, bits)
    else:
        codes = _feed_back(matrix, inverse, blocks.scales, zeros, bits=bits, block_size=size)
    return replace(blocks, codes=codes)


def _feed_back(matrix: Float, inverse: Inverse, scales: Float, zeros: Float, *, bits: int, block_size: int) -> Codes:
    """Return codes uint8[out, blocks, block_size] on a grid float32[out, blocks], with error feedback."""
    rows, width = matrix.shape
    block_of = inverse.order // block_size
    steps_of = np.ascontiguousarray(scales.T)[block_of], np.ascontiguousarray(zeros.T)[block_of]
    rest = np.ascontiguousarray(matrix.T[inverse.order])  # [in, out]: a column of W is a contiguous row here
    codes = np.repeat(zeros.astype(np.uint8), block_size, axis=1)
    for first in range(0, width, COLUMNS_AT_ONCE):
        here = slice(first, first + COLUMNS_AT_ONCE)
        part, scale, zero = rest[here], steps_of[0][here], steps_of[1][here]
        found, errors = _round_columns(part, inverse.factor[here, here], scale, zero, 2**bits - 1)
        codes[:, inverse.order[here]] = found.T
        rest[first + len(part) :] -= inverse.factor[here, first + len(part) :].T @ errors
    return codes.reshape(rows, -1, block_size)


def _round_columns(part: Float, factor: Float, scale: Float, zero: Float, top: int) -> tuple[Codes, Float]:
    """Return codes uint8 and scaled errors float32[columns, out] of part float32[columns, out], which is changed."""
    codes, errors = np.empty(part.shape, np.uint8), np.empty_like(part)
    for column in range(len(part)):
        code = np.clip(np.rint(part[column] / scale[column]) + zero[column], 0, top)
        codes[column] = code
        errors[column] = (part[column] - (code - zero[column]) * scale[column]) / factor[column, column]
        part[column + 1 :] -= factor[column, column + 1 :, None] * errors[column]
    return codes, errors
