"""What a killed `add` or `remove` left in a bundle, and how it is put right.

The manifest is the commit point: it is replaced in one step, and what it lists is the truth. A change goes

    add:      write adapters/.NAME.tmp-X, rename to NAME, replace the manifest
    replace:  write .NAME.tmp-X, rename NAME to .NAME.old-X and .NAME.tmp-X to NAME, replace the manifest,
              delete .NAME.old-X
    remove:   replace the manifest, delete NAME

so that whatever happens the listed files are in NAME or in .NAME.old-X.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from edgeadapt.bundle.manifest import Manifest
from edgeadapt.bundle.names import ADAPTER_FILES, PATCH_FILE
from edgeadapt.errors import FileError
from edgeadapt.files import locked_directory, sha256_file, sync_folder, write_errors

_OLD = re.compile(r"\.(?P<name>.+)\.old-[0-9a-f]{8}")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.tmp-[0-9a-f]{8}")


def recover(folder: Path, manifest: Manifest) -> None:
    """Put back an adapter that an interrupted replacement has moved aside; where that cannot be done, do nothing."""
    if not any(_OLD.fullmatch(path.name) for path in _entries(folder)):
        return
    # A reader must not fail because the disk is read-only or a writer is at work: the file checks say what is wrong.
    with suppress(FileError), locked_directory(folder, wait_s=0):
        restore(folder, manifest)


def restore(folder: Path, manifest: Manifest) -> None:
    """Settle every `.NAME.old-X` by the manifest: put it back if it is what the manifest lists, else delete it.

    The caller holds the lock.
    """
    with write_errors(folder):
        for path in _entries(folder):
            match = _OLD.fullmatch(path.name)
            if match is None:
                continue
            name = match["name"]
            if not _is_listed(path.parent / name, name, manifest) and _is_listed(path, name, manifest):
                shutil.rmtree(path.parent / name, ignore_errors=True)
                path.rename(path.parent / name)
                sync_folder(path.parent)
            elif _is_listed(path.parent / name, name, manifest) or name not in manifest.adapters:
                shutil.rmtree(path)


def clean(folder: Path, manifest: Manifest) -> None:
    """Remove what interrupted changes left: temporary folders, and adapter folders that the manifest does not list.

    A folder with files that no adapter has is someone's own and stays. The caller holds the lock.
    """
    restore(folder, manifest)
    with write_errors(folder):
        for path in _entries(folder):
            leftover = _TEMPORARY.fullmatch(path.name) or path.name not in manifest.adapters
            if leftover and path.is_dir() and not path.is_symlink():
                names = {item.name for item in path.iterdir()}
                if names <= {*ADAPTER_FILES, PATCH_FILE} and not _OLD.fullmatch(path.name):
                    shutil.rmtree(path)
        for path in folder.glob(".manifest.json.tmp-*"):
            path.unlink()


def _entries(folder: Path) -> list[Path]:
    adapters = folder / "adapters"
    return sorted(adapters.iterdir()) if adapters.is_dir() and not adapters.is_symlink() else []


def _is_listed(place: Path, name: str, manifest: Manifest) -> bool:
    """Whether the folder `place` holds the files that the manifest lists for adapter `name`."""
    if name not in manifest.adapters:
        return False
    files = [f for f in (*ADAPTER_FILES, PATCH_FILE) if f"adapters/{name}/{f}" in manifest.files]
    for file in files:
        record = manifest.files[f"adapters/{name}/{file}"]
        path = place / file
        if not path.is_file() or path.stat().st_size != record.size or sha256_file(path) != record.sha256:
            return False
    return True
