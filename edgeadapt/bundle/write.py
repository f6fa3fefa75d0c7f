"""A bundle's files, written into a folder that nobody sees yet (`files.staged_directory`). Same input, same bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgeadapt.bundle.adapter_json import SCHEMA, AdapterJson, TensorRecord, dump_adapter_json, read_adapter_json
from edgeadapt.bundle.golden import Golden, dump_golden
from edgeadapt.bundle.manifest import AdapterRecord, FileRecord, Manifest
from edgeadapt.bundle.names import MANIFEST_FILE, check_adapter_name, check_file_path
from edgeadapt.bundle.rules import dump_manifest, file_role, manifest_digest
from edgeadapt.bundle.stored import to_stored
from edgeadapt.errors import BundleError
from edgeadapt.fields import to_mapping
from edgeadapt.files import sha256_file
from edgeadapt.onnx_adapter import dump_onnx_adapter

Array = NDArray[Any]


def write_assets(folder: Path, assets: Mapping[str, bytes]) -> None:
    """Write the base's own files (config, tokenizer, ...) to `folder`/assets.

    Raises:
        BundleError: if a name is not a plain relative path.
    """
    for name, data in sorted(assets.items()):
        check_file_path(f"assets/{name}", "the base's assets")
        path = folder / "assets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_adapter(  # noqa: PLR0917 - in the order of the folder's content
    folder: Path,
    name: str,
    tensors: Mapping[str, Array],
    record: AdapterRecord,
    golden: Golden,
    dtype: str,
    *,
    base_fingerprint: str,
) -> AdapterRecord:
    """Write an adapter's three files to `folder`/adapters/`name` and return its record for the manifest.

    The record comes back with the golden's tolerance and minimum effect.

    Args:
        folder: the bundle's (staged) folder.
        name: the adapter's.
        tensors: float32 by graph input name, as `bind` gives them.
        record: what is known of the adapter.
        golden: see `golden.make_golden`.
        dtype: how they are stored, see `stored.py`.
        base_fingerprint: the manifest's `base.fingerprint`.

    Raises:
        BundleError: if the name or a tensor may not be written.
    """
    files, record = adapter_files(name, tensors, record, golden, dtype, base_fingerprint=base_fingerprint)
    place = folder / "adapters" / name
    place.mkdir(parents=True)
    for file, data in files.items():
        (place / file).write_bytes(data)
    return record


def adapter_files(
    name: str,
    tensors: Mapping[str, Array],
    record: AdapterRecord,
    golden: Golden,
    dtype: str,
    *,
    base_fingerprint: str,
) -> tuple[dict[str, bytes], AdapterRecord]:
    """Return the files of `write_adapter` as bytes by file name, and the record.

    Raises:
        BundleError: if the name or a tensor may not be written.
    """
    check_adapter_name(name)
    stored = to_stored(tensors, dtype)
    record = dataclasses.replace(record, tolerance=golden.tolerance, minimum_effect=golden.minimum_effect)
    records = {key: TensorRecord(str(value.dtype), value.shape) for key, value in stored.items()}
    content = AdapterJson(SCHEMA, name, base_fingerprint, record, records)
    files = {
        "adapter.json": dump_adapter_json(content),
        "adapter.onnx_adapter": dump_onnx_adapter(stored),
        "golden.safetensors": dump_golden(golden),
    }
    return files, record


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write `folder`/manifest.json, last, and return the manifest as written.

    `files` and `digest` are filled in from what lies in the folder, whatever they hold before.

    Raises:
        BundleError: if a file lies where none belongs, an adapter's own record differs, or a rule is broken.
    """
    files = list_files(folder)
    complete = dataclasses.replace(manifest, files=files)
    data = dump_manifest(complete)
    for name, record in complete.adapters.items():
        content = read_adapter_json(folder / "adapters" / name / "adapter.json")
        if content.record != record or content.base_fingerprint != manifest.base.fingerprint:
            raise BundleError(
                f"adapter {name!r}: its adapter.json differs from the manifest", hint="use the record that was written"
            )
    (folder / MANIFEST_FILE).write_bytes(data)
    return dataclasses.replace(complete, digest=manifest_digest(to_mapping(complete)))


def list_files(folder: Path) -> dict[str, FileRecord]:
    """Return a record of every file in `folder` but the manifest, by path, sorted.

    Raises:
        BundleError: if a file or link lies where none belongs.
    """
    result: dict[str, FileRecord] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST_FILE or (path.is_dir() and not path.is_symlink()):
            continue
        role = file_role(name)
        if role is None or path.is_symlink() or not path.is_file():
            raise BundleError(
                f"{name!r} does not belong into a bundle", hint="this is a fault of the export; report it"
            )
        result[name] = FileRecord(path.stat().st_size, sha256_file(path), role)
    return dict(sorted(result.items()))
