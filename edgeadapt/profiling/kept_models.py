"""Models that were made for a runtime, kept in a folder of the user's: to ship what was measured, and to convert once.

```
models.json            what they were made of and for, what opens them, and the digest of every file
model/...              the files that the runtime opens
adapters/NAME.safetensors, defaults.safetensors
                       what the inputs of models with adapters as inputs are fed, where the bundle does not say it
reports/...            what a converter told
```
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgeadapt import __version__
from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import FileError, ProfileError
from edgeadapt.fields import from_mapping, to_mapping
from edgeadapt.files import parse_json, read_bytes, require_free_space, sha256_file, staged_directory
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.transports._folder import link_or_copy

Array = NDArray[Any]

SCHEMA = "edgeadapt.models/1"
RECORD = "models.json"
_DEFAULTS = "defaults.safetensors"
_OF_THE_DEVICE = "threads"
"""The option that a later profile may want otherwise of the same models."""


@dataclass(frozen=True)
class Record:
    """What `models.json` says.

    schema: `SCHEMA`
    origin: the bundle, the runtime, and what else the models depend on
    files, options, notes: see `job.Models`
    adapters: names of those that are fed what is kept here, nothing where there is no file; None where the bundle's own
        tensors are fed
    sha256: digests of all other files, by their paths
    """

    schema: str
    origin: Mapping[str, Any]
    files: Mapping[str, str]
    options: Mapping[str, Any]
    adapters: tuple[str, ...] | None
    notes: tuple[str, ...]
    sha256: Mapping[str, str]


def converts(module: ModuleType) -> bool:
    """Tell whether a runtime has models made for it; else it opens the bundle's own files."""
    return hasattr(module, "made_for")


def check_converts(module: ModuleType) -> None:
    """Refuse to keep models of a runtime that opens the bundle's own.

    Raises:
        ProfileError: if it does.
    """
    if not converts(module):
        raise ProfileError(
            f"runtime {_runtime(module)!r} opens the bundle's own files: no models are made that could be kept",
            hint="leave --models out",
        )


def prepared_models(
    module: ModuleType,
    bundle: Bundle,
    device: Device,
    folder: Path,
    shapes: Shapes,
    *,
    kept: Path | None,
) -> Models:
    """Put what a runtime opens into a job's folder: made now, or taken from where it was kept.

    Args:
        module: the runtime's file in runtimes/.
        bundle: what is measured.
        device: where.
        folder: the job's.
        shapes: for runtimes whose models are of fixed shapes.
        kept: a folder to keep the models in, and to take them from if they are there; None to do neither.

    Raises:
        ProfileError: if they cannot be made; if the folder holds models that were made of or for something else, or
            that were changed since.
        FileError: if the folder cannot be written, or holds something else. Where that shows only when they are made,
            which may have taken an hour, a note says so instead, and they are measured.
    """
    if kept is None:
        found: Models = module.prepare(bundle, device, folder, shapes)
        return found
    check_converts(module)
    origin = {
        "edgeadapt": __version__,
        "runtime": _runtime(module),
        "bundle": bundle.manifest.name,
        "manifest_sha256": sha256_file(bundle.path / "manifest.json"),
        **module.made_for(device, shapes),
    }
    if (kept / RECORD).is_file():
        return _taken(kept, origin, device, folder)
    made: Models | None = None
    try:
        with staged_directory(kept, force=True, replaces=None) as staged:
            made = module.prepare(bundle, device, folder, shapes)
            _keep(staged, made, origin, folder)
    except FileError as error:
        if made is None:
            raise
        return replace(made, notes=(*made.notes, f"these models are not kept: {error.message}"))
    return made


def _keep(staged: Path, models: Models, origin: Mapping[str, Any], folder: Path) -> None:
    """Write models, and what is known of them."""
    require_free_space(staged, sum(path.stat().st_size for path in _files(folder).values()))
    for path in sorted(folder.iterdir()):
        shutil.copytree(path, staged / path.name)  # no links: the user may do with them as they like
    for name, arrays in (models.adapters or {}).items():
        _save(arrays, staged / _adapter_file(name))
    _save(models.defaults or {}, staged / _DEFAULTS)
    record = Record(
        schema=SCHEMA,
        origin=origin,
        files=models.files,
        options={name: value for name, value in models.options.items() if name != _OF_THE_DEVICE},
        adapters=None if models.adapters is None else tuple(sorted(models.adapters)),
        notes=models.notes,
        sha256={name: sha256_file(path) for name, path in _files(staged).items()},
    )
    # unsorted: an engine may read an order of inputs off its options
    (staged / RECORD).write_text(json.dumps(to_mapping(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _taken(kept: Path, origin: Mapping[str, Any], device: Device, folder: Path) -> Models:
    """Return models that were kept, as files of a job."""
    hint = "choose another folder, or remove this one to have them made again"
    data = parse_json(read_bytes(kept / RECORD), str(kept / RECORD), ProfileError)
    record = from_mapping(Record, data, str(kept / RECORD), ProfileError)
    if record.schema != SCHEMA:
        raise ProfileError(f"{kept / RECORD} is of {record.schema!r}, not {SCHEMA!r}", hint=hint)
    for name in (*origin, *record.origin):
        found, wanted = record.origin.get(name), origin.get(name)
        if found != wanted:
            raise ProfileError(f"{kept} holds models for {name} {found!r}, and {wanted!r} is wanted", hint=hint)
    there = _files(kept)
    del there[RECORD]
    for name in sorted({*there, *record.sha256}):
        if name not in there or sha256_file(there[name]) != record.sha256.get(name):
            raise ProfileError(f"{kept / name} is not what was kept there", hint=hint)
    adapters = record.adapters
    fed = {_DEFAULTS, *map(_adapter_file, adapters or ())}  # the job has them in a file of its own
    for name in there.keys() - fed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(there[name], folder / name)
    return Models(
        files=record.files,
        options={**record.options, _OF_THE_DEVICE: device.threads},
        adapters=None if adapters is None else {name: _load(there.get(_adapter_file(name))) for name in adapters},
        defaults=_load(there.get(_DEFAULTS)),
        notes=record.notes,
    )


def _runtime(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _files(folder: Path) -> dict[str, Path]:
    """Return the files below a folder by their paths in it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _adapter_file(name: str) -> str:
    return f"adapters/{name}.safetensors"


def _load(path: Path | None) -> dict[str, Array]:
    return {} if path is None else load_file(path)


def _save(arrays: Mapping[str, Array], path: Path) -> None:
    if not arrays:
        return
    path.parent.mkdir(exist_ok=True)
    save_file({name: np.asarray(value, order="C") for name, value in arrays.items()}, path)
