"""float32 tensors into an adapter's file and back."""

from __future__ import annotations

import re

import numpy as np
import pytest

from edgeadapt.bundle.stored import DTYPES, as_stored, to_float32, to_stored
from edgeadapt.errors import BundleError
from edgeadapt.onnx_adapter import dump_onnx_adapter, parse_onnx_adapter

RNG = np.random.default_rng(3)
TENSORS = {
    "q.a": RNG.normal(size=(64, 4)).astype(np.float32) * np.array([1e-3, 1.0, 50.0, 1e-6], np.float32),
    "q.b": RNG.normal(size=(4, 48)).astype(np.float32),
    "conv.a": RNG.normal(size=(2, 8, 3, 3)).astype(np.float32),
    "conv.b": RNG.normal(size=(16, 2, 1, 1)).astype(np.float32),
    "q.offset": RNG.normal(size=48).astype(np.float32),
    "zero": np.zeros((3, 5), np.float32),
}


def test_every_float16_comes_back_exactly():
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = numbers[np.isfinite(numbers)]
    found = to_float32({"x": finite.reshape(-1, 2)})["x"].reshape(-1)
    np.testing.assert_array_equal(found.view(np.uint32), finite.astype(np.float32).view(np.uint32))  # -0 too


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_through_a_file(dtype):
    stored = to_stored(TENSORS, dtype)
    assert list(stored) == sorted(stored)
    read = parse_onnx_adapter(dump_onnx_adapter(stored), "f").tensors
    back = to_float32(read)
    assert back.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert back[name].dtype == np.float32
        assert back[name].shape == value.shape
        np.testing.assert_array_equal(back[name], as_stored(TENSORS, dtype)[name])
    if dtype == "float32":
        np.testing.assert_array_equal(back["q.a"], TENSORS["q.a"])


def test_int8_has_one_scale_per_rank_so_that_a_small_column_is_not_lost_beside_a_large_one():
    stored = to_stored(TENSORS, "int8")
    assert {name: value.shape for name, value in stored.items() if name.endswith(".scale")} == {
        "q.a.scale": (1, 4),
        "q.b.scale": (4, 1),
        "conv.a.scale": (2, 1, 1, 1),
        "conv.b.scale": (1, 2, 1, 1),
        "zero.scale": (3, 1),
    }
    assert stored["q.offset"].dtype == np.float16
    back = to_float32(stored)
    for name in ("q.a", "q.b", "conv.a", "conv.b"):
        step = stored[name + ".scale"]
        assert stored[name].dtype == np.int8
        assert np.abs(stored[name]).max() == 127
        assert (np.abs(back[name] - TENSORS[name]) <= 0.5001 * step).all()
    np.testing.assert_array_equal(back["zero"], TENSORS["zero"])


def test_what_int8_and_float16_cannot_hold_stays_wide():
    tiny, large = np.full((2, 3), 1e-38, np.float32), np.full(3, 1e6, np.float32)
    stored = to_stored({"tiny": tiny, "large": large}, "int8")
    assert {name: value.dtype.name for name, value in stored.items()} == {"tiny": "float32", "large": "float32"}
    assert to_stored({"large": large}, "float16")["large"].dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q.a.scale": None}, "tensor 'q.a' is int8, and 'q.a.scale' float32 is missing"),
        ({"q.a.scale": np.ones((1, 4), np.float16)}, "tensor 'q.a' is int8, and 'q.a.scale' float32 is missing"),
        ({"q.a.scale": np.ones((4,), np.float32)}, "the scales of tensor 'q.a' int8[64, 4] are float32[4]; each axis"),
        ({"q.a.scale": np.ones((2, 4), np.float32)}, "the scales of tensor 'q.a' int8[64, 4] are float32[2, 4]"),
        ({"q.a.scale": np.zeros((1, 4), np.float32)}, "the scales of tensor 'q.a' must be above 0 and at most"),
        (
            {"q.a.scale": np.full((1, 4), 3e38, np.float32)},
            "the scales of tensor 'q.a' must be above 0 and at most 2.66e+36",
        ),
    ],
)
def test_scales_that_do_not_fit_are_refused(changes, message):
    stored = {**to_stored(TENSORS, "int8"), **changes}
    with pytest.raises(BundleError, match=re.escape(message)):
        to_float32({name: value for name, value in stored.items() if value is not None})


def test_other_dtypes_and_names_are_refused():
    with pytest.raises(BundleError) as caught:
        to_stored(TENSORS, "int4")
    assert caught.value.message == "adapter dtype 'int4'"
    assert caught.value.hint == "use one of float32, float16, int8"
    with pytest.raises(BundleError) as caught:
        to_stored({"q.scale": TENSORS["q.b"]}, "int8")
    assert caught.value.message == "tensor 'q.scale' is named like the scales of another"
    assert "q.scale" in to_stored({"q.scale": TENSORS["q.b"]}, "float16")
