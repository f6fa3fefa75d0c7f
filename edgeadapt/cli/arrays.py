"""Arrays from and to .npz files, by name."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt.errors import FileError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file by name.

    Raises:
        FileError: if it cannot be read, is no .npz file, is damaged, or holds Python objects.
    """
    import numpy as np

    hint = "make it with numpy.savez(FILE, input_ids=..., attention_mask=...)"
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise FileError(f"{path} holds one array without a name", hint=hint)
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FileError(f"{path} is no .npz file of plain arrays: {error}", hint=hint) from error


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to an .npz file, whole or not at all.

    Raises:
        FileError: if it cannot be written.
    """
    import numpy as np

    from edgeadapt.files import write_atomically

    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **dict(arrays))
    write_atomically(path, buffer.getvalue())
