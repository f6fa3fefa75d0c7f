"""Convolution weights in int8 with one scale per output channel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def round_channels(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return codes int8[out, ...] and scales float32[out, 1, ...] with weight = codes * scales, rounded to nearest."""
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scales = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    scales = scales.reshape(-1, *[1] * (weight.ndim - 1))
    return encode_channels(weight, scales), scales


def encode_channels(weight: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return the nearest codes int8[out, ...] of a weight on scales float32[out, 1, ...]."""
    return np.asarray(np.clip(np.rint(weight / scales), -127, 127), np.int8)
