"""The contents of a GGUF file: metadata, and tensors dequantized."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.adapters.gguf_head import GgufTensor, read_head
from edgeadapt.errors import BaseModelError

Weights = NDArray[np.float32]


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


def _contents(data: mmap.mmap, path: Path) -> GgufFile:
    head = read_head(data)
    tensors = {tensor.name: _tensor(data, head.start + tensor.offset, tensor, path) for tensor in head.tensors}
    return GgufFile(head.metadata, tensors)


def _tensor(data: mmap.mmap, start: int, info: GgufTensor, path: Path) -> Weights:
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
