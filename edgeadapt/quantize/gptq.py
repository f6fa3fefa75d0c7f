"""Error-aware rounding: each weight's rounding error is made up for by the weights that are not yet rounded.

The algorithm is GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1): the columns of W are rounded one after the other;
with H = E[x x^T] and U the upper Cholesky factor of its inverse, the error of column j moves column k > j by
-error / U[j, j] * U[j, k]. The inputs with the largest second moment come first, while there are many others left to
make up for them; scales and zero points are those of the block as it was (GPTQ's "act order" with "static groups").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeadapt.quantize.blocks import Blocks, Codes, Float, block_count, grid

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
    rows, width = matrix.shape
    blocks = block_count(width, block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :width] = matrix
    scales, zeros = grid(padded.reshape(rows, blocks, block_size), bits, symmetric=False, search=True)
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
    return Blocks(codes.reshape(rows, blocks, block_size), scales, zeros.astype(np.uint8), bits, width)


def _round_columns(part: Float, factor: Float, scale: Float, zero: Float, top: int) -> tuple[Codes, Float]:
    """Return codes uint8 and scaled errors float32[columns, out] of part float32[columns, out], which is changed."""
    codes, errors = np.empty(part.shape, np.uint8), np.empty_like(part)
    for column in range(len(part)):
        code = np.clip(np.rint(part[column] / scale[column]) + zero[column], 0, top)
        codes[column] = code
        errors[column] = (part[column] - (code - zero[column]) * scale[column]) / factor[column, column]
        part[column + 1 :] -= factor[column, column + 1 :, None] * errors[column]
    return codes, errors
