"""Weights that are rounded once for all mixes of bits that are tried."""

from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.quantize.blocks import pack, unpack
from edgeadapt.quantize.mixed import rank_groups
from edgeadapt.quantize.quantize import quantize
from edgeadapt.quantize.rounded import RoundedWeights

RNG = np.random.default_rng(0)


class Counted(dict):
    """Moments that count how often they are collected."""

    asked = 0

    def __getitem__(self, path):
        self.asked += 1
        return super().__getitem__(path)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_codes_are_unpacked_as_they_were(bits, count):
    codes = RNG.integers(0, 2**bits, (3, 2, count), np.uint8)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits, count), codes)


@pytest.mark.parametrize("block_size", [16, 32])
def test_each_weight_is_rounded_once_and_the_bytes_are_the_same(tiny, tmp_path, block_size):
    inputs = RNG.standard_normal((500, 96)).astype(np.float32)
    moments = Counted({"gemm": inputs.T @ inputs / 500})
    asked = {"keep": {"lm_head": "int4"}, "moments": moments, "block_size": block_size}

    def bytes_of(raised, rounded):
        graph, record = quantize(tiny, "int4", raised=raised, rounded=rounded, **asked)
        values = graph.models["model"].graph.initializers
        return {name: value.const_value.tobytes() for name, value in values.items()}, record

    alone = [bytes_of(raised, None) for raised in ((), {"plain"}, {"gemm"})]
    rounded = RoundedWeights(tmp_path)
    rank_groups(tiny, {}, rounded=rounded, **asked)
    moments.asked = 0
    assert [bytes_of(raised, rounded) for raised in ((), {"plain"}, {"gemm"})] == alone
    assert moments.asked == 0
    assert len({path.name for path in tmp_path.iterdir()}) == 5
