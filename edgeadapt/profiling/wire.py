"""Protocol Buffers' wire format, as much as ONNX files need: a device has no onnx package.

https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator

from edgeadapt.errors import BundleError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10


def fields(data: memoryview, where: str) -> Iterator[tuple[int, int | memoryview]]:
    """Yield a message's fields in order: number, and an int (varint) or the bytes of anything else.

    Args:
        data: the message.
        where: what it is, for messages.

    Raises:
        BundleError: if it is no such message.
    """
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at, where)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at, where)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            length, at = _read_varint(data, at, where)
        elif kind in _WIDTHS:
            length = _WIDTHS[kind]
        else:
            raise _damaged(where)
        if length > len(data) - at:
            raise _damaged(where)
        yield tag >> 3, data[at : at + length]
        at += length


def numbers(value: int | memoryview, where: str) -> list[int]:
    """Return what one field of repeated integers holds: one, or many packed together."""
    if isinstance(value, int):
        return [signed(value)]
    found, at = [], 0
    while at < len(value):
        number, at = _read_varint(value, at, where)
        found.append(signed(number))
    return found


def signed(value: int) -> int:
    """Return a varint as the int64 that it stands for."""
    return value - (1 << 64) if value >> 63 else value


def text(value: int | memoryview, where: str) -> str:
    """Return a field's bytes as text.

    Raises:
        BundleError: if they are none.
    """
    if isinstance(value, int):
        raise _damaged(where)
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(where) from error


def message(*parts: tuple[int, int | str | bytes]) -> bytes:
    """Return a message of fields: ints become varints, text and bytes are written with their length."""
    return b"".join(_field(number, value) for number, value in parts)


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value & ((1 << 64) - 1))
    data = value.encode("utf-8") if isinstance(value, str) else value
    return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: memoryview, at: int, where: str) -> tuple[int, int]:
    value = 0
    for place in range(_LONGEST_VARINT):
        if at + place >= len(data):
            break
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value & ((1 << 64) - 1), at + place + 1
    raise _damaged(where)


def _damaged(where: str) -> BundleError:
    return BundleError(f"{where} is not an ONNX graph", hint="check the bundle with `edgeadapt verify`")
