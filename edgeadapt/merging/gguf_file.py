"""The GGUF container: header, metadata, tensors (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

gguf's own reader makes several numpy views for each string, which takes seconds for a vocabulary.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import BaseModelError

Weights = NDArray[np.float32]
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
# Value types by number, as struct formats (specification, `gguf_metadata_value_type`).
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_LARGEST_RANK = 8


@dataclass(frozen=True)
class GgufFile:
    """Metadata by key (lists for arrays), and float32 tensors in torch's axis order."""

    metadata: dict[str, Any]
    tensors: dict[str, Weights]


def read_gguf(path: Path) -> GgufFile:
    """Return a GGUF file's contents, dequantized.

    Raises:
        BaseModelError: if it is missing, damaged, one of several parts, or quantized in a way that gguf cannot undo.
    """
    if not path.is_file():
        raise BaseModelError(f"there is no file {str(path)!r}", hint="check the path of the GGUF file")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            contents = _contents(data, path)
    except (struct.error, ValueError, OverflowError, RecursionError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(f"{path} is no readable GGUF file: {reason}", hint="download it again") from error
    parts = contents.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise BaseModelError(
            f"{path} is one of {parts} parts", hint="join them with llama.cpp's `llama-gguf-split --merge`"
        )
    return contents


class _TensorInfo(NamedTuple):
    """One entry of the table of tensors: shape in torch's order, quantization type, offset in the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


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


def _contents(data: mmap.mmap, path: Path) -> GgufFile:
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
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    if len({info.name for info in infos}) != len(infos):
        raise ValueError("a tensor's name occurs twice")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"the alignment {alignment!r} is impossible")
    start = -(-cursor.at // alignment) * alignment
    tensors = {info.name: _tensor(data, start + info.offset, info, path) for info in infos}
    return GgufFile(metadata, tensors)


def _tensor_info(cursor: _Cursor) -> _TensorInfo:
    name, rank = cursor.string(), cursor.number("<I")
    if rank > _LARGEST_RANK:
        raise ValueError(f"the tensor {name!r} claims {rank} axes")
    shape = tuple(cursor.number("<Q") for _ in range(rank))
    return _TensorInfo(name, shape[::-1], cursor.number("<I"), cursor.number("<Q"))


def _tensor(data: mmap.mmap, start: int, info: _TensorInfo, path: Path) -> Weights:
    """Return the tensor whose bytes begin at `start`, dequantized."""
    import gguf

    name, shape, kind = info.name, info.shape, info.kind
    if kind not in {int(member) for member in gguf.GGMLQuantizationType}:
        raise ValueError(f"the tensor {name!r} has the unknown type {kind}")
    qtype = gguf.GGMLQuantizationType(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    count = math.prod(shape)
    size = count // block * block_bytes
    if count % block or start + size > len(data):
        raise ValueError(f"the tensor {name!r} of shape {shape} does not fit into the file")
    raw = np.frombuffer(data[start : start + size], dtype=np.uint8)
    if qtype in {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}:
        plain = raw.view(np.float32 if qtype == gguf.GGMLQuantizationType.F32 else np.float16)
        return plain.reshape(shape).astype(np.float32)
    try:
        values: Weights = gguf.dequantize(raw.reshape(*shape[:-1], -1), qtype)
    except NotImplementedError as error:
        raise BaseModelError(
            f"{path}: the tensor {name!r} is quantized as {qtype.name}, which gguf cannot undo",
            hint="use another quantization of this model, or its Hugging Face folder",
        ) from error
    return values.reshape(shape)
