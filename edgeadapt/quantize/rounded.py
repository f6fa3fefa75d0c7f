"""Weights that were rounded before: every mix of bits that is tried needs most of them again, and rounding is dear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgeadapt.quantize.blocks import Blocks, pack, unpack
from edgeadapt.quantize.weights import Weight


class RoundedWeights:
    """Weights of one graph in 4 bits, for one set of moments and one block size, in files of a folder that is there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[str, str, bool], Path] = {}

    def of(self, weight: Weight, make: Callable[[], Blocks]) -> Blocks:
        """Return a weight in blocks, made if it was not before."""
        key = weight.path, str(weight.initializer.name), weight.transposed
        file = self._files.get(key)
        if file is not None:
            return _read(file)
        blocks = make()
        file = self._folder / f"{len(self._files)}.npz"
        _write(file, blocks)
        self._files[key] = file
        return blocks


def _write(file: Path, blocks: Blocks) -> None:
    zeros = {} if blocks.zero_points is None else {"zero_points": blocks.zero_points}
    numbers = np.asarray([blocks.bits, blocks.in_features, blocks.block_size])
    codes = pack(blocks.codes, blocks.bits)
    np.savez(file, allow_pickle=False, codes=codes, scales=blocks.scales, numbers=numbers, **zeros)


def _read(file: Path) -> Blocks:
    with np.load(file) as arrays:
        bits, in_features, block_size = arrays["numbers"].tolist()
        codes = unpack(arrays["codes"], bits, block_size)
        return Blocks(codes, arrays["scales"], arrays.get("zero_points"), bits, in_features)
