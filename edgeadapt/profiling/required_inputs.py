"""ONNX graphs whose optional inputs become required ones, for runtimes that know no optional ones.

A bundle's slots are graph inputs with an initializer of the same name as their default. ONNX Runtime's JavaScript API
lists required inputs alone: in node it ignores whatever else is fed, on the web it refuses it. So the initializers are
taken out, and whoever runs the graph feeds their values itself.

The files are cut at the level of protobuf's wire format (https://protobuf.dev/programming-guides/encoding), because a
device has no onnx; the numbers of fields are those of onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import ProfileError

Array = NDArray[Any]
ReadExternal = Callable[[str, int, int | None], bytes]

_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT = 5, 11
_VALUE_NAME = 1
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_FLOATS, _TENSOR_INT64S, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 4, 7, 8, 9
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DTYPES = {1: "<f4", 6: "<i4", 7: "<i8", 10: "<f2"}
_FLOAT, _INT64 = 1, 7


class _Field(NamedTuple):
    """One field of a message: `value` is an int for varints, else the bytes; start and end of all of it."""

    number: int
    value: int | memoryview
    start: int
    end: int

    @property
    def data(self) -> memoryview:
        """The bytes of a field that has some."""
        if isinstance(self.value, int):
            raise _broken()
        return self.value

    @property
    def integer(self) -> int:
        """The number of a field that is one."""
        if not isinstance(self.value, int):
            raise _broken()
        return self.value


def require_inputs(model: bytes, read_external: ReadExternal) -> tuple[bytes, dict[str, Array]]:
    """Return a model without the defaults of its inputs, and these defaults by input name.

    Args:
        model: the bytes of an ONNX file.
        read_external: returns bytes of a file beside the model: its name, where they begin, how many (None: all).

    Raises:
        ProfileError: if it is no ONNX model, or a default is of a kind that is not read here.
    """
    whole = memoryview(model)
    graph = next((field for field in _fields(whole) if field.number == _MODEL_GRAPH), None)
    if graph is None:
        raise _broken()
    kept, defaults = _without_defaults(graph.data, read_external)
    head = _varint(_MODEL_GRAPH << 3 | _BYTES) + _varint(len(kept))
    return b"".join((whole[: graph.start], head, kept, whole[graph.end :])), defaults


def _without_defaults(graph: memoryview, read_external: ReadExternal) -> tuple[bytes, dict[str, Array]]:
    fields = list(_fields(graph))
    inputs = {_name(field.data, _VALUE_NAME) for field in fields if field.number == _GRAPH_INPUT}
    kept, defaults = [], {}
    for field in fields:
        name = _name(field.data, _TENSOR_NAME) if field.number == _GRAPH_INITIALIZER else None
        if name is not None and name in inputs:
            defaults[name] = _tensor(field.data, name, read_external)
        else:
            kept.append(graph[field.start : field.end])
    return b"".join(kept), defaults


def _tensor(data: memoryview, name: str, read_external: ReadExternal) -> Array:
    """Return a TensorProto's values."""
    found: dict[int, list[_Field]] = {}
    for field in _fields(data):
        found.setdefault(field.number, []).append(field)
    kind = sum(field.integer for field in found.get(_TENSOR_TYPE, ()))
    if kind not in _DTYPES:
        raise _unread(name, f"it is of ONNX's type {kind}")
    shape = [axis for field in found.get(_TENSOR_DIMS, ()) for axis in _counts(field)]
    dtype = np.dtype(_DTYPES[kind])
    values = _values(found, kind, read_external)
    if len(values) != prod(shape) * dtype.itemsize:
        raise _unread(name, f"{len(values)} bytes are not {dtype.name}{shape}")
    return np.frombuffer(values, dtype).reshape(shape)


def _values(found: Mapping[int, list[_Field]], kind: int, read_external: ReadExternal) -> bytes:
    if any(field.integer == 1 for field in found.get(_TENSOR_LOCATION, ())):
        entries = [field.data for field in found.get(_TENSOR_EXTERNAL, ())]
        place = {_name(entry, _ENTRY_KEY): _name(entry, _ENTRY_VALUE) for entry in entries}
        length = int(place["length"]) if "length" in place else None
        return read_external(place.get("location", ""), int(place.get("offset", 0)), length)
    if _TENSOR_RAW in found:
        return bytes(found[_TENSOR_RAW][0].data)
    if kind == _FLOAT:
        return b"".join(bytes(field.data) for field in found.get(_TENSOR_FLOATS, ()))
    numbers = [number for field in found.get(_TENSOR_INT64S, ()) for number in _counts(field)]
    return np.asarray(numbers if kind == _INT64 else [], np.uint64).tobytes()


def _counts(field: _Field) -> list[int]:
    """Return the numbers of a repeated field, packed or one of many."""
    if isinstance(field.value, int):
        return [field.value]
    found, place = [], 0
    while place < len(field.value):
        number, place = _read_varint(field.value, place)
        found.append(number)
    return found


def _name(message: memoryview, number: int) -> str:
    for field in _fields(message):
        if field.number == number:
            return bytes(field.data).decode("utf-8", "replace")
    return ""


def _fields(message: memoryview) -> Iterator[_Field]:
    """Give the fields of a message in the order in which they lie."""
    place = 0
    while place < len(message):
        start = place
        key, place = _read_varint(message, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, place = _read_varint(message, place)
            yield _Field(number, value, start, place)
            continue
        if wire == _BYTES:
            size, place = _read_varint(message, place)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise _broken()
        if place + size > len(message):
            raise _broken()
        yield _Field(number, message[place : place + size], start, place + size)
        place += size


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise _broken()
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise _broken()


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def _broken() -> ProfileError:
    return ProfileError("a graph of the bundle is not a valid ONNX file", hint="check it with `edgeadapt verify`")


def _unread(name: str, problem: str) -> ProfileError:
    return ProfileError(
        f"the default of graph input {name!r} cannot be read: {problem}",
        hint="check the bundle with `edgeadapt verify`",
    )
