"""Error-aware rounding: each weight's rounding error is made up for by the weights that are not yet rounded.

The algorithm is GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1): the columns of W are rounded in order; with
H = E[x x^T] and U the upper Cholesky factor of its inverse, the error of column j moves column k > j by
-error / U[j, j] * U[j, k]. Scales and zero points are found when a block is reached, on what its weights are by then.
"""

from __future__ import annotations

import numpy as np

from edgeadapt.quantize.blocks import Blocks, Float, block_count, grid

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean: inputs that the calibration text never excites stay harmless."""


def inverse_factor(moment: Float, damping: float = DAMPING) -> Float:
    """Return U float32[in, in], upper triangular, with U^T U = (moment + damping * mean(diagonal) * I)^-1.

    Reversing both axes turns the lower Cholesky factor into an upper one: H = R R^T, so H^-1 = R^-T R^-1 and U = R^-1.

    Raises:
        numpy.linalg.LinAlgError: if the damped moment is not positive definite.
    """
    damped = moment.astype(np.float64)
    mean = float(np.trace(damped)) / len(damped)
    damped[np.diag_indices_from(damped)] += damping * mean if mean > 0 else 1.0
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return np.asarray(np.triu(np.linalg.inv(lower[::-1, ::-1])), np.float32)


def round_with_feedback(matrix: Float, factor: Float, bits: int, block_size: int, *, symmetric: bool = False) -> Blocks:
    """Return `matrix` float32[out, in] in blocks, rounded column by column with error feedback.

    Args:
        matrix: float32[out, in].
        factor: float32[in, in] from `inverse_factor`.
        bits: 4 or 8.
        block_size: weights along a row that share a scale.
        symmetric: no zero points.
    """
    rows, width = matrix.shape
    blocks = block_count(width, block_size)
    rest = np.ascontiguousarray(matrix.T, np.float32).copy()  # [in, out]: a column of W is a contiguous row here
    codes = np.empty((blocks * block_size, rows), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.float32)
    importance = np.asarray(1 / np.square(np.diagonal(factor)), np.float32)
    for block in range(blocks):
        here = slice(block * block_size, min((block + 1) * block_size, width))
        part = rest[here]
        scale, zero = grid(
            np.ascontiguousarray(part.T), bits, symmetric=symmetric, search=True, importance=importance[here]
        )
        scales[:, block], zeros[:, block] = scale, zero
        steps, errors = _round_block(part, factor[here, here], scale, -zero, 2**bits - 1 - zero)
        codes[here] = (steps + zero).astype(np.uint8)
        rest[here.stop :] -= factor[here, here.stop :].T @ errors
    codes[width:] = zeros[:, -1].astype(np.uint8)
    packed = np.ascontiguousarray(codes.T).reshape(rows, blocks, block_size)
    return Blocks(packed, scales, None if symmetric else zeros.astype(np.uint8), bits, width)


def _round_block(part: Float, factor: Float, scale: Float, low: Float, high: Float) -> tuple[Float, Float]:
    """Return whole steps within low..high and scaled errors, both float32[columns, out], of part, which is changed."""
    steps, errors = np.empty_like(part), np.empty_like(part)
    for column in range(len(part)):
        np.rint(part[column] / scale, out=steps[column])
        np.clip(steps[column], low, high, out=steps[column])
        errors[column] = (part[column] - steps[column] * scale) / factor[column, column]
        part[column + 1 :] -= factor[column, column + 1 :, None] * errors[column]
    return steps, errors
