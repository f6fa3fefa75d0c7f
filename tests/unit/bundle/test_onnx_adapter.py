from __future__ import annotations

import re
import struct

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeadapt.errors import BundleError, FileError
from edgeadapt.onnx_adapter import ALIGNMENT_BYTES, dump_onnx_adapter, parse_onnx_adapter, read_onnx_adapter

TENSORS = {
    "layer.q.lora_B": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer.q.lora_A": np.arange(5, dtype=np.float16).reshape(5, 1),
    "ünï": np.array([2.5], np.float32),
    "x": np.ones((2, 1, 3, 3), np.float32),
    "y": np.array([[-128, 127], [0, 1]], np.int8),
}
NAMES = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20)
ARRAYS = st.tuples(
    st.sampled_from([np.float32, np.float16, np.int8]),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 9),
).map(lambda item: np.random.default_rng(item[2]).normal(size=item[1]).astype(item[0]))


def _equal(one, other):
    assert list(one) == sorted(other)
    for name, value in other.items():
        assert one[name].dtype == value.dtype
        np.testing.assert_array_equal(one[name], value)
        assert one[name].shape == value.shape


@given(st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=5), st.integers(-(2**31), 2**31 - 1))
@settings(max_examples=60)
def test_there_and_back(tensors, version):
    content = parse_onnx_adapter(dump_onnx_adapter(tensors, adapter_version=version), "f")
    _equal(content.tensors, tensors)
    assert (content.adapter_version, content.model_version) == (version, 1)


def test_bytes_depend_on_nothing_but_the_tensors():
    data = dump_onnx_adapter(TENSORS)
    assert data == dump_onnx_adapter(dict(reversed(TENSORS.items())))
    columns = {**TENSORS, "layer.q.lora_B": np.asfortranarray(TENSORS["layer.q.lora_B"])}
    assert data == dump_onnx_adapter(columns)


def test_data_is_aligned():
    data = dump_onnx_adapter(TENSORS)
    for value in TENSORS.values():
        if value.nbytes > 8:
            assert data.index(value.tobytes()) % ALIGNMENT_BYTES == 0
    assert data.index(TENSORS["ünï"].tobytes()) % ALIGNMENT_BYTES == 0


def test_onnxruntime_reads_what_we_write(tmp_path):
    path = tmp_path / "a.onnx_adapter"
    path.write_bytes(dump_onnx_adapter(TENSORS, adapter_version=7, model_version=9))
    read = onnxruntime.AdapterFormat.read_adapter(str(path))
    _equal({name: value.numpy() for name, value in sorted(read.get_parameters().items())}, TENSORS)
    assert (read.get_format_version(), read.get_adapter_version(), read.get_model_version()) == (1, 7, 9)
    onnxruntime.LoraAdapter().Load(str(path))


def test_we_read_what_onnxruntime_writes(tmp_path):
    path = tmp_path / "a.onnx_adapter"
    writer = onnxruntime.AdapterFormat()
    writer.set_adapter_version(7)
    writer.set_model_version(0)
    writer.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in TENSORS.items()})
    writer.export_adapter(str(path))
    content = read_onnx_adapter(path)
    _equal(content.tensors, TENSORS)
    assert (content.adapter_version, content.model_version) == (7, 0)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileError, match="No such file"):
        read_onnx_adapter(tmp_path / "no")


def _parses(data: bytes) -> bool:
    try:
        content = parse_onnx_adapter(data, "f")
    except BundleError as error:
        if not error.message.startswith("f: not a valid .onnx_adapter file: "):
            raise
        return False
    for value in content.tensors.values():
        assert np.isfinite(value).all()
    return True


SMALL = dump_onnx_adapter({"a": np.ones((2, 3), np.float32), "b": np.ones(3, np.float16)})


def test_every_truncation_is_refused():
    assert _parses(SMALL)
    assert not any(_parses(SMALL[:length]) for length in range(len(SMALL)))


def test_every_flipped_bit_is_refused_or_harmless():
    outcomes = set()
    for position in range(len(SMALL)):
        for bit in range(8):
            data = bytearray(SMALL)
            data[position] ^= 1 << bit
            outcomes.add(_parses(bytes(data)))
    assert outcomes == {True, False}


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 4), st.integers(0, 2**32 - 1)), min_size=1, max_size=4))
@settings(max_examples=500)
def test_overwritten_words(changes):
    data = bytearray(SMALL)
    for position, word in changes:
        struct.pack_into("<I", data, position, word)
    _parses(bytes(data))


@given(st.binary(max_size=300))
def test_noise(data):
    assert not _parses(data)
    _parses(SMALL[:8] + data)


def _patched(find: bytes, replace: bytes) -> bytes:
    assert SMALL.count(find) == 1
    return SMALL.replace(find, replace)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "bytes 4 to 8 are b'', not b'TORT'"),
        (SMALL.replace(b"TORT", b"TORX"), "bytes 4 to 8 are b'TORX', not b'TORT'"),
        (SMALL[:8], "it ends at byte 8, but bytes 32 to 36 are needed"),
        (_patched(struct.pack("<qq", 2, 3), struct.pack("<qq", 2, -3)), "tensor 'a' has the shape [2, -3]"),
        (_patched(struct.pack("<qq", 2, 3), struct.pack("<qq", 2, 2**62)), f"tensor 'a' has the shape [2, {2**62}]"),
        (_patched(struct.pack("<qq", 2, 3), struct.pack("<qq", 0, 3)), "tensor 'a' has the shape [0, 3]"),
        (
            _patched(struct.pack("<qq", 2, 3), struct.pack("<qq", 2, 4)),
            "tensor 'a' of shape [2, 4] needs 32 bytes, has 24",
        ),
        (_patched(b"\x01\0\0\0b", b"\x01\0\0\0a"), "two tensors are named 'a'"),
        (_patched(b"\x01\0\0\0b", b"\x01\0\0\0\n"), r"a parameter's name holds control characters: '\n'"),
        (_patched(b"\x01\0\0\0b", b"\x00\0\0\0b"), "a parameter's name has 0 bytes, must be 1 to 1024"),
        (
            _patched(b"\x01\0\0\0b", b"\x01\0\0\0\xff"),
            "a parameter's name is not UTF-8: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
        (
            SMALL.replace(np.float32(1).tobytes() * 6, np.float32(np.nan).tobytes() * 6),
            "tensor 'a' holds NaN or infinite values",
        ),
        (
            SMALL.replace(np.float16(1).tobytes() * 3, np.float16(np.inf).tobytes() * 3),
            "tensor 'b' holds NaN or infinite values",
        ),
    ],
)
def test_refusals(data, message):
    with pytest.raises(BundleError) as caught:
        parse_onnx_adapter(data, "f")
    assert str(caught.value) == (
        f"f: not a valid .onnx_adapter file: {message}\n"
        "Hint: the file is damaged or was not made by edgeadapt; remove the adapter and add it again"
    )


def _field(data: bytes, index: int, field: int, value: int) -> bytes:
    """Set a scalar of a Parameter table of our own layout."""
    tables = 32 + 20 + 4 + 4 * 2
    return data[: tables + 20 * index + field] + struct.pack("<i", value) + data[tables + 20 * index + field + 4 :]


@pytest.mark.parametrize("code", [0, 2, 7, 8, 16, -1, 2**31 - 1])
def test_other_data_types_are_refused(code):
    with pytest.raises(
        BundleError, match=rf"'b' has data type {code}; only 1 \(float32\), 3 \(int8\) and 10 \(float16\)"
    ):
        parse_onnx_adapter(_field(SMALL, 1, 12, code), "f")


def test_other_format_versions_are_refused():
    data = SMALL[:36] + struct.pack("<i", 2) + SMALL[40:]
    with pytest.raises(BundleError, match="format version 2, only 1 is known"):
        parse_onnx_adapter(data, "f")


def test_many_tensors_on_the_same_data_are_refused():
    """A small file must not become a large adapter."""
    one = dump_onnx_adapter(
        {"a": np.ones(100, np.float32), "b": np.ones(100, np.float32), "c": np.ones(100, np.float32)}
    )
    tables = 32 + 20 + 4 + 4 * 3
    raw = [tables + 20 * i + 16 + struct.unpack_from("<I", one, tables + 20 * i + 16)[0] for i in range(3)]
    shared = bytearray(one[: raw[0] + 4 + 400])
    for index in (1, 2):  # names and dims of b and c lie behind the data of a: use those of a, with names of their own
        table = tables + 20 * index
        for field in (4, 8, 16):
            target = tables + field + struct.unpack_from("<I", one, tables + field)[0]
            struct.pack_into("<I", shared, table + field, target - (table + field))
    with pytest.raises(BundleError, match="two tensors are named 'a'"):
        parse_onnx_adapter(bytes(shared), "f")
    names = struct.pack("<I", 1) + b"b\0\0\0" + struct.pack("<I", 1) + b"c\0\0\0"
    shared += bytes(-len(shared) % 4)
    for index, offset in ((1, 0), (2, 8)):
        table = tables + 20 * index
        struct.pack_into("<I", shared, table + 4, len(shared) + offset - (table + 4))
    with pytest.raises(BundleError, match="tensors share their data"):
        parse_onnx_adapter(bytes(shared + names), "f")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "an adapter file needs at least one tensor"),
        ({"a": np.ones(2)}, "tensor 'a' is float64"),
        ({"a": np.float32(1).reshape(())}, "tensor 'a' has 0 axes, an adapter file holds 1 to 8"),
        ({"a": np.ones((2, 0), np.float32)}, "tensor 'a' is empty: shape [2, 0]"),
        ({"a": np.array([1, np.inf], np.float16)}, "tensor 'a' holds NaN or infinite values"),
    ],
)
def test_what_is_not_written(tensors, message):
    with pytest.raises(BundleError) as caught:
        dump_onnx_adapter(tensors)
    assert caught.value.message == message


@pytest.mark.parametrize("position", [0, 63, 64, 127, 191])
def test_infinity_among_bytes_that_look_like_it(position):
    values = np.ones((3, 64), np.float16)
    names = ("a", "||||||||", "~~~~")
    data = dump_onnx_adapter(dict(zip(names, values, strict=True)))
    assert parse_onnx_adapter(data, "f").tensors.keys() == set(names)
    values.reshape(-1)[position] = 2.5
    data = dump_onnx_adapter(dict(zip(names, values, strict=True)))
    data = data.replace(np.float16(2.5).tobytes(), np.float16(-np.inf).tobytes())
    with pytest.raises(BundleError, match=f"tensor {re.escape(repr(names[position // 64]))} holds NaN or infinite"):
        parse_onnx_adapter(data, "f")


@pytest.mark.parametrize("position", [0, 5_000, 299_999])
def test_infinity_in_a_large_file(position):
    values = np.ones((3, 100_000), np.float16)
    values.reshape(-1)[position] = 2.5
    data = dump_onnx_adapter(dict(zip("abc", values, strict=True)))
    assert parse_onnx_adapter(data, "f").tensors.keys() == set("abc")
    data = data.replace(np.float16(2.5).tobytes(), np.float16(np.nan).tobytes())
    with pytest.raises(BundleError, match=f"tensor '{'abc'[position // 100_000]}' holds NaN or infinite"):
        parse_onnx_adapter(data, "f")
