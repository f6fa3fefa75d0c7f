"""The head of a GGUF file: metadata and the table of tensors (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

gguf's own reader makes several numpy views for each string, which takes seconds for a vocabulary.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
# Value types by number, as struct formats (specification, `gguf_metadata_value_type`).
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_LARGEST_RANK = 8


class GgufTensor(NamedTuple):
    """One entry of the table of tensors: shape in torch's order, quantization type, offset in the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHead:
    """Metadata by key (lists for arrays), the tensors, and the byte at which their data begins."""

    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    start: int


def read_head(data: mmap.mmap) -> GgufHead:
    """Return the head of the file that is mapped at `data`.

    Raises:
        ValueError, struct.error: it is damaged or no GGUF file.
    """
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("<I")
    if version not in {2, 3}:
        raise ValueError(f"version {version} is unknown (big-endian files are not read)")
    tensor_count, entry_count = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    tensors = [_tensor_info(cursor) for _ in range(tensor_count)]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("a tensor's name occurs twice")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"the alignment {alignment!r} is impossible")
    start = -(-cursor.at // alignment) * alignment
    return GgufHead(metadata, tensors, start)


class _Cursor:
    """A place in the file that moves forward and never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends after {len(self.data)} bytes, {self.at + size} are needed")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind} at byte {self.at} is unknown")
        number = self.number(_SCALARS[kind])
        return float(str(np.float32(number))) if kind == _FLOAT32 else number  # the decimal that it was written from

    def array(self) -> list[Any]:
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            return [item[0] for item in struct.iter_unpack(_SCALARS[kind], self.take(count * size))]
        if count > len(self.data):
            raise ValueError(f"an array at byte {self.at} claims {count} entries")
        return [self.value(kind) for _ in range(count)]


def _tensor_info(cursor: _Cursor) -> GgufTensor:
    name, rank = cursor.string(), cursor.number("<I")
    if rank > _LARGEST_RANK:
        raise ValueError(f"the tensor {name!r} claims {rank} axes")
    shape = tuple(cursor.number("<Q") for _ in range(rank))
    return GgufTensor(name, shape[::-1], cursor.number("<I"), cursor.number("<Q"))
