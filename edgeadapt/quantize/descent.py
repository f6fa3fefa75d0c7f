"""Rounding that starts from codes: one code after the other goes where the layer's output error is least.

For a row of weights w with codes that stand for q, the error of the layer's output is (q - w) H (q - w)^T with
H = E[x x^T]. Coordinate descent (QuantEase, Behdin et al., arXiv:2309.01885) sets each code to the best one while all
others stay; the error never grows. From the codes of another matrix it changes the few that matter, where rounding anew
with error feedback (`gptq.py`) changes a fifth of all, since each error moves what comes after it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgeadapt.quantize.blocks import Blocks, Codes, Float
from edgeadapt.quantize.gptq import DAMPING

PASSES = 2
"""Over all columns. On SmolLM2 a trained adapter's error after 1, 2, 3 passes is 1.03, 1.00, 0.98 of that of rounding
anew, and 2.6, 3.2, 3.6 % of the codes are changed rather than 19.8 % (docs/decisions/0006-promotion.md)."""
COLUMNS_AT_ONCE = 64


def descend(matrix: Float, blocks: Blocks, moment: Float, *, passes: int = PASSES, damping: float = DAMPING) -> Blocks:
    """Return `matrix` float32[out, in] on the scales and zero points of `blocks`, its codes changed where that pays.

    Args:
        matrix: of the shape that `blocks` stands for.
        blocks: the grid, and the codes to start from.
        moment: float32[in, in], E[x x^T] of the layer's input.
        passes: over all columns.
        damping: added to the diagonal, as a share of its mean (see `gptq.invert`).
    """
    rows, width = matrix.shape
    order = np.argsort(-np.diagonal(moment), kind="stable")
    damped = np.ascontiguousarray(moment[np.ix_(order, order)], np.float32)
    mean = float(np.trace(damped, dtype=np.float64)) / width
    damped[np.diag_indices(width)] += damping * mean if mean > 0 else 1.0

    def columns(values: NDArray[np.float32]) -> Float:
        """Return float32[out, in or more] as float32[in, out] in the order of the descent."""
        return np.ascontiguousarray(values[:, :width].T[order])

    scales = columns(np.repeat(blocks.scales, blocks.block_size, axis=1))
    codes = columns(blocks.codes.reshape(rows, -1).astype(np.float32))
    errors = columns(blocks.dequantize()) - columns(matrix)
    for _ in range(passes):
        for first in range(0, width, COLUMNS_AT_ONCE):
            here = slice(first, first + COLUMNS_AT_ONCE)
            slopes = damped[here] @ errors
            top = 2**blocks.bits - 1
            _descend_columns(slopes, damped[here, here], scales[here], codes[here], errors[here], top=top)
    changed: Codes = blocks.codes.reshape(rows, -1).copy()
    changed[:, order] = codes.T.astype(np.uint8)
    return replace(blocks, codes=changed.reshape(blocks.codes.shape))


def _descend_columns(slopes: Float, curve: Float, scales: Float, codes: Float, errors: Float, *, top: int) -> None:
    """Change codes and errors float32[columns, out] in place; slopes are the product of H and all errors, here."""
    for column, slope in enumerate(slopes):
        steps = slope / (scales[column] * -curve[column, column])
        rows = np.flatnonzero(np.abs(steps) > 0.5)  # else the code is the nearest already
        if not len(rows):
            continue
        before = codes[column, rows]
        after = np.clip(before + np.rint(steps[rows]), 0, top)
        moved = (after - before) * scales[column, rows]
        codes[column, rows] = after
        errors[column, rows] += moved
        slopes[column + 1 :, rows] += curve[column + 1 :, column, None] * moved
