"""Linear layers in 4 bits with whole zero points; the head, embeddings and convolutions in 8.

Rounding 4-bit weights to nearest ruins small models. With the second moments of each layer's input on calibration
texts the rounding errors are made to cancel (see `quantize.gptq`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.quantize.blocks import Blocks, round_to_nearest
from edgeadapt.quantize.descent import descend
from edgeadapt.quantize.gptq import Inverse, invert, round_on_grid, round_with_feedback
from edgeadapt.quantize.rewrite import use_blocks
from edgeadapt.quantize.scheme import Settings, Stored
from edgeadapt.quantize.weights import Weight

SUMMARY = "4-bit linear layers, the rest 8-bit; needs --calibrate for small models"
BLOCK_SIZE = 32


def usual(weight: Weight) -> tuple[str, str]:
    """Return int8 for what suffers most from 4 bits or gains least."""
    if weight.kind == "conv":
        return "int8", "convolution"
    if weight.kind == "embedding":
        return "int8", "embedding"
    if weight.is_head:
        return "int8", "head"
    return "int4", ""


def refuses(weight: Weight) -> str | None:
    """Return why `weight` cannot be stored in 4 bits, or None."""
    if weight.kind == "conv":
        return "ONNX Runtime has no 4-bit convolution"
    if weight.kind == "embedding":
        # GatherBlockQuantized reads wrong zero points for an odd number of 4-bit blocks (1.24.3; right in 1.32).
        return "4-bit embeddings are read wrongly by ONNX Runtime 1.24"
    return None


def apply(uses: Sequence[Weight], settings: Settings) -> Stored:
    """Store the matrix in 4 bits, with error feedback where calibration moments are at hand."""
    matrix = uses[0].matrix()
    blocks = rounded(uses[0], matrix, settings)
    stored = use_blocks(uses, blocks)
    return Stored(
        stored.bytes,
        "nearest" if settings.moment is None else "feedback",
        lambda other: stored.codes(_again(other, blocks, settings.moment)),
        lambda: matrix - blocks.dequantize(),
    )


def rounded(weight: Weight, matrix: NDArray[np.float32], settings: Settings) -> Blocks:
    """Return a weight, `matrix` float32[out, in], in 4 bits, with error feedback where there are moments."""

    def make() -> Blocks:
        if settings.moment is None:
            return round_to_nearest(matrix, 4, settings.block_size, symmetric=False, search=True)
        return round_with_feedback(matrix, _inverse(settings.moment(), settings.memory), 4, settings.block_size)

    if settings.rounded is None:
        return make()
    return settings.rounded.of(weight, make)


def _again(matrix: NDArray[np.float32], blocks: Blocks, moment: Callable[[], NDArray[np.float32]] | None) -> Blocks:
    """Return another matrix on the same scales: nearest, or with moments as few codes changed as the error allows."""
    return round_on_grid(matrix, blocks) if moment is None else descend(matrix, blocks, moment())


def _inverse(moment: NDArray[np.float32], memory: dict[str, Any]) -> Inverse:
    """Return the moment's inverse, the last one again for layers that share their input's moment."""
    last = memory.get("inverse")
    if last is None or last[0] is not moment:
        last = memory["inverse"] = (moment, invert(moment))
    found: Inverse = last[1]
    return found
