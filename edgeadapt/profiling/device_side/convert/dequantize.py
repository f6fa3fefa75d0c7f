"""Quantized weights back to float32: the layouts of MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .graph import Node

Array = NDArray[Any]


def matrix_of_blocks(node: Node, codes: Array, scales: Array, zero_points: Array | None = None) -> Array:
    """Return MatMulNBits' weight float32[N, K].

    Args:
        node: with attributes K, N, bits and block_size.
        codes: uint8[N, blocks, block_size * bits / 8], the first code of a byte in the low half.
        scales: float[N * blocks], in any shape.
        zero_points: uint8[N, ceil(blocks * bits / 8)], packed like the codes; None for 2^(bits - 1).
    """
    rows, width = int(node.get("N")), int(node.get("K"))
    bits, block_size = int(node.get("bits", 4)), int(node.get("block_size"))
    blocks = -(-width // block_size)
    values = unpacked(codes.reshape(rows, blocks, -1), bits)[..., :block_size].astype(np.float32)
    values -= _zeros(zero_points, bits, rows, blocks)
    values *= scales.reshape(rows, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :width])


def table_of_blocks(node: Node, codes: Array, scales: Array, zero_points: Array | None = None) -> Array:
    """Return the table float32[rows, width] that GatherBlockQuantized looks rows up in.

    Args:
        node: with attributes bits and block_size; axes are 0 (gathered) and 1 (quantized), as edgeadapt writes it.
        codes: uint8[rows, width * bits / 8].
        scales: float[rows, blocks].
        zero_points: packed like the codes, or None.
    """
    bits, block_size = int(node.get("bits", 4)), int(node.get("block_size"))
    rows, blocks = scales.shape
    values = unpacked(codes, bits)
    width = values.shape[1]
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :width] = values
    grouped = padded.reshape(rows, blocks, block_size)
    grouped -= _zeros(zero_points, bits, rows, blocks)
    grouped *= scales[:, :, None].astype(np.float32)
    return np.ascontiguousarray(padded[:, :width])


def unpacked(codes: Array, bits: int) -> Array:
    """Return packed codes uint8[..., bytes] as one code a byte, uint8[..., bytes * 8 / bits]."""
    if bits == 8:
        return codes.astype(np.uint8)
    low, high = codes & 0x0F, codes >> 4
    return np.stack([low, high], axis=-1).reshape(*codes.shape[:-1], -1)


def _zeros(zero_points: Array | None, bits: int, rows: int, blocks: int) -> Array:
    """Return float32[rows, blocks, 1]."""
    if zero_points is None:
        return np.full((rows, blocks, 1), 2 ** (bits - 1), np.float32)
    codes = unpacked(zero_points.reshape(rows, -1), bits)[:, :blocks]
    return codes[:, :, None].astype(np.float32)
