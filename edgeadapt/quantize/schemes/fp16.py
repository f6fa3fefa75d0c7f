"""Weights stored in float16, cast to float32 when the graph is loaded: half the file, float32 speed and memory.

A tensor with a number that float16 cannot hold stays float32, and the record says so: the model stays right, and a
model that loses a few megabytes of saving is worth more than none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeadapt.quantize.rewrite import use_half
from edgeadapt.quantize.scheme import Settings, Stored
from edgeadapt.quantize.weights import Weight

SUMMARY = "float16 in the file, float32 when it runs"
BLOCK_SIZE = 32

_LARGEST = float(np.finfo(np.float16).max)


def usual(_weight: Weight) -> tuple[str, str]:
    """Return this scheme for every weight."""
    return "fp16", ""


def refuses(weight: Weight) -> str | None:
    """Return why `weight` does not fit float16, or None."""
    largest = float(np.abs(weight.tensor.numpy()).max(initial=0.0))
    return f"its largest magnitude {largest:.3g} is beyond float16's {_LARGEST:.0f}" if largest > _LARGEST else None


def apply(uses: Sequence[Weight], _settings: Settings) -> Stored:
    """Store the constant as it lies, in float16."""
    count, name = use_half(uses, uses[0].tensor.numpy().astype(np.float16))
    return Stored(count, "float16", lambda other: {name: _laid(uses[0], other).astype(np.float16)})


def _laid(use: Weight, matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    return matrix.T if use.transposed else matrix
