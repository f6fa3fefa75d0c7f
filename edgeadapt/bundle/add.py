"""Adding and removing adapters of a bundle in place, as files. See recover.py for the order of steps.

Whether an adapter works is for a session to say: its golden is measured before it comes here.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgeadapt.bundle.bind import check_inputs
from edgeadapt.bundle.bundle import Bundle, open_bundle
from edgeadapt.bundle.golden import Golden
from edgeadapt.bundle.manifest import AdapterRecord, FileRecord, Manifest
from edgeadapt.bundle.names import MANIFEST_FILE, check_adapter_name
from edgeadapt.bundle.recover import clean, restore
from edgeadapt.bundle.rules import adapter_paths, dump_manifest, file_role, patch_path
from edgeadapt.bundle.write import adapter_files
from edgeadapt.errors import BundleError
from edgeadapt.files import (
    locked_directory,
    remove_tree,
    require_free_space,
    sha256_file,
    sync_folder,
    sync_tree,
    write_atomically,
    write_errors,
)

Array = NDArray[Any]

_WAIT_S = 60.0
"""For another process's change of the same bundle; a change takes about as long as copying the adapter."""


def insert_adapter(
    bundle: Bundle,
    name: str,
    tensors: Mapping[str, Array],
    record: AdapterRecord,
    golden: Golden,
    *,
    replace: bool = False,
) -> Bundle:
    """Write an adapter into the bundle's folder and return the bundle opened anew.

    The bundle is valid at every moment: with the adapter or without (with `replace`: the new one or the old).

    Args:
        bundle: the bundle; other processes may have added adapters since it was opened.
        name: the adapter's.
        tensors: float32 by graph input name, as `bind` gives them.
        record: what is known of the adapter; tolerance and minimum effect are the golden's.
        golden: see `golden.make_golden`.
        replace: allow an adapter of this name to be there already.

    Raises:
        BundleError: if the name is taken or not allowed, a tensor does not fit, or the bundle is another one by now.
        FileError: if it cannot be written; the bundle is then as before.
    """
    with locked_directory(bundle.path, wait_s=_WAIT_S):
        manifest = _current(bundle)
        _check_name(name, manifest, replace=replace)
        values = check_inputs(name, tensors, manifest)
        files, record = adapter_files(
            name, values, record, golden, manifest.adapter_dtype, base_fingerprint=manifest.base.fingerprint
        )
        clean(bundle.path, manifest)
        require_free_space(bundle.path, sum(len(data) for data in files.values()))
        _publish(bundle.path, manifest, name, record, files)
    return open_bundle(bundle.path)


def remove_adapter(bundle: Bundle, name: str) -> Bundle:
    """Remove an adapter and return the bundle opened anew; without adapters it serves the base.

    Raises:
        BundleError: if there is no such adapter, listing those that there are.
        FileError: if the bundle cannot be written; it is then as before.
    """
    with locked_directory(bundle.path, wait_s=_WAIT_S):
        manifest = _current(bundle)
        Bundle(bundle.path, manifest).adapter_record(name)
        adapters = {key: value for key, value in manifest.adapters.items() if key != name}
        files = {
            path: value
            for path, value in manifest.files.items()
            if path not in (*adapter_paths(name), patch_path(name))
        }
        _write_manifest(bundle.path, dataclasses.replace(manifest, adapters=adapters, files=files))
        with write_errors(bundle.path):
            remove_tree(bundle.path / "adapters" / name)
    return open_bundle(bundle.path)


def _current(bundle: Bundle) -> Manifest:
    """Return the manifest as it is now, under the lock."""
    manifest = open_bundle(bundle.path, check_files=False).manifest
    if manifest.base.fingerprint != bundle.manifest.base.fingerprint or manifest.slots != bundle.manifest.slots:
        raise BundleError(f"{bundle.path} was replaced by another bundle meanwhile", hint="open it again and retry")
    restore(bundle.path, manifest)
    return open_bundle(bundle.path).manifest


def _check_name(name: str, manifest: Manifest, *, replace: bool) -> None:
    check_adapter_name(name, manifest.adapters)
    if name in manifest.adapters and not replace:
        raise BundleError(
            f"the bundle has an adapter {name!r} already",
            hint="choose another name with --name, or replace it with --force",
        )


def _publish(folder: Path, manifest: Manifest, name: str, record: AdapterRecord, files: Mapping[str, bytes]) -> None:
    adapters = folder / "adapters"
    place = adapters / name
    suffix = secrets.token_hex(4)
    staging, old = adapters / f".{name}.tmp-{suffix}", adapters / f".{name}.old-{suffix}"
    try:
        with write_errors(place):
            staging.mkdir(parents=True)
            for file, data in files.items():
                (staging / file).write_bytes(data)
            sync_tree(staging)
            if os.path.lexists(place):
                place.rename(old)
            staging.rename(place)
            sync_folder(adapters)
        _write_manifest(folder, _with_adapter(folder, manifest, name, record))
    except BaseException:
        remove_tree(staging)
        _roll_back(folder, manifest, name)
        raise
    remove_tree(old)


def _with_adapter(folder: Path, manifest: Manifest, name: str, record: AdapterRecord) -> Manifest:
    files = {path: value for path, value in manifest.files.items() if path != patch_path(name)}
    for path in adapter_paths(name):
        files[path] = FileRecord((folder / path).stat().st_size, sha256_file(folder / path), str(file_role(path)))
    return dataclasses.replace(manifest, adapters={**manifest.adapters, name: record}, files=files)


def _roll_back(folder: Path, manifest: Manifest, name: str) -> None:
    """After a failure: what the manifest on disk says holds, and that may already be the new one."""
    now = open_bundle(folder, check_files=False).manifest
    restore(folder, now)
    if now == manifest and name not in manifest.adapters:
        remove_tree(folder / "adapters" / name)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST_FILE, dump_manifest(manifest))
