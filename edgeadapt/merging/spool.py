"""Weights in a file that is mapped into memory, so that they take memory only while they are read."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from edgeadapt.errors import FileError
from edgeadapt.memory import give_back

SMALLEST_BYTES = 1 << 16
_ALIGNMENT = mmap.PAGESIZE


def spool(module: torch.nn.Module, folder: Path) -> Callable[[], None]:
    """Move the large parameters of `module` into a file in `folder`, and return what drops them from memory.

    The parameters stay usable at any time: the system reads them again when they are needed. The file has no name, so
    that nothing is left of it, however the process ends.

    Raises:
        FileError: if the file cannot be written.
    """
    places: list[tuple[torch.nn.Parameter, int]] = []
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for parameter in module.parameters():
                if parameter.nbytes >= SMALLEST_BYTES and parameter.device.type == "cpu":
                    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                    places.append((parameter, file.tell()))
                    file.write(parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if not places:
                return give_back
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise FileError(
            f"the base's weights cannot be written to a file in {folder}: {error}", hint="free some space on that disk"
        ) from error
    for parameter, start in places:
        values = torch.frombuffer(mapped, dtype=parameter.dtype, count=parameter.numel(), offset=start)
        parameter.data = values.view(parameter.shape)

    def rest() -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
        give_back()

    rest()
    return rest
