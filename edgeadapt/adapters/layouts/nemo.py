"""Adapters that NVIDIA NeMo saved, known in order to be refused with the reason.

`save_adapters` writes a pickle with a list of state dicts for each adapter, in the order of the model's modules but
without their names, and the config, which alone holds activation and position of the norm, as an OmegaConf object
(nemo/core/classes/mixins/adapter_mixins.py). A `.nemo` file is an archive with the model's config and a checkpoint.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.adapters.peft_files import CONFIG
from edgeadapt.adapters.torch_file import MAX_TABLE_BYTES
from edgeadapt.errors import AdapterError

_MARKS = (b"__cfg__", b"omegaconf")


def holds(folder: Path) -> bool:
    """Tell whether `folder` has a file that NeMo wrote, and no config."""
    return not (folder / CONFIG).is_file() and bool(_files(folder))


def read(name: str, folder: Path, root: Path) -> Adapter:
    """Refuse the adapter in `folder`.

    Raises:
        AdapterError: always.
    """
    del name, root
    file = _files(folder)[0]
    if file.suffix == ".nemo":
        raise AdapterError(
            f"{file} is an archive of NeMo, whose modules have other names than those of the base as others load it",
            hint="convert LoRA to Hugging Face's form with NeMo's own exporter, and give what peft reads",
        )
    raise AdapterError(
        f"{file} is what NeMo's save_adapters writes: it does not say which modules the adapter changes, and its "
        "config can only be had by running the pickle",
        hint="with NeMo at hand write a linear_adapter folder (docs/formats/adapter-folder.md): of each module with an "
        "adapter_layer, norm, down and up are its module.0, module.1 and module.3",
    )


def _files(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if file.is_file()] if folder.is_dir() else []
    return [file for file in files if file.suffix == ".nemo" or (file.suffix == ".pt" and _is_saved_by_nemo(file))]


def _is_saved_by_nemo(file: Path) -> bool:
    """Tell whether a file of torch.save's has NeMo's entries in its table; nothing of it is run."""
    try:
        with zipfile.ZipFile(file) as archive:
            tables = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if len(tables) != 1 or tables[0].file_size > MAX_TABLE_BYTES:
                return False
            table = archive.read(tables[0])
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):
        return False
    return all(mark in table for mark in _MARKS)
