"""How many numbers a base holds, read off the heads of its files."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from edgeadapt.adapters.gguf_head import read_head
from edgeadapt.adapters.safetensors_file import read_tensors
from edgeadapt.errors import AdapterError, BaseModelError


def parameter_count(base: Path) -> int:
    """Return how many numbers a model's files hold: a folder with safetensors, or a GGUF file.

    Raises:
        BaseModelError: there is no such file, or it is damaged.
    """
    files = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
    if not files:
        raise BaseModelError(
            f"{base} holds no safetensors file",
            hint="give the folder of the base with model.safetensors, or a GGUF file",
        )
    return sum(_numbers(file) for file in files)


def _numbers(file: Path) -> int:
    try:
        if file.suffix == ".safetensors":
            return sum(math.prod(tensor.shape) for tensor in read_tensors(file).values())
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return sum(math.prod(tensor.shape) for tensor in read_head(data).tensors)
    except (AdapterError, struct.error, ValueError, OverflowError, RecursionError, OSError) as error:
        reason = error.message if isinstance(error, AdapterError) else str(error)
        raise BaseModelError(f"{file} is no readable model: {reason}", hint="download it again") from error
