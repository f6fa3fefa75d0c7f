"""Weights in 8 bits: linear layers and embeddings in blocks, convolutions per output channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeadapt.quantize.blocks import round_to_nearest
from edgeadapt.quantize.channels import encode_channels, round_channels
from edgeadapt.quantize.gptq import round_on_grid
from edgeadapt.quantize.rewrite import use_blocks, use_channels
from edgeadapt.quantize.scheme import Settings, Stored
from edgeadapt.quantize.weights import Weight

SUMMARY = "8-bit weights; next to no loss"
BLOCK_SIZE = 32


def usual(_weight: Weight) -> tuple[str, str]:
    """Return this scheme for every weight."""
    return "int8", ""


def refuses(_weight: Weight) -> str | None:
    """Return None: 8 bits hold any weight."""
    return None


def apply(uses: Sequence[Weight], settings: Settings) -> Stored:
    """Store the constant in 8 bits, rounded to nearest, without zero points."""
    if uses[0].kind == "conv":
        codes, scales = round_channels(np.asarray(uses[0].tensor.numpy(), np.float32))
        count, name = use_channels(uses, codes, scales)
        return Stored(count, "nearest", lambda other: {name: encode_channels(other, scales)})
    blocks = round_to_nearest(uses[0].matrix(), 8, settings.block_size, symmetric=True)
    stored = use_blocks(uses, blocks)
    return Stored(stored.bytes, "nearest", lambda other: stored.codes(round_on_grid(other, blocks)))
