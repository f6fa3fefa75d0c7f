"""Adapters that peft saved, and those that other trainers save in its layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeadapt.adapters import peft_files
from edgeadapt.adapters.adapter import Adapter, BaseReference
from edgeadapt.adapters.fingerprint import find_fingerprint
from edgeadapt.adapters.kind import kind_of, known_kinds
from edgeadapt.adapters.safetensors_file import read_tensors
from edgeadapt.errors import AdapterError


def holds(folder: Path) -> bool:
    """Tell whether `folder` has a config named as peft names it."""
    return (folder / peft_files.CONFIG).is_file()


def read(name: str, folder: Path, root: Path) -> Adapter:
    """Return the adapter in `folder`; see `edgeadapt.adapters.read`."""
    config = peft_files.read_config(folder)
    config_file = folder / peft_files.CONFIG
    kind, kind_name = _kind_of(config, config_file)
    try:
        warnings: list[str] = list(kind.check(config))
    except AdapterError as error:
        raise AdapterError(f"{config_file}: {error.message}", hint=error.hint) from error
    file, more = peft_files.tensor_file(folder)
    tensors, unused = peft_files.normalize(read_tensors(file), kind.TERMS)
    base, base_warnings = _base(config, folder, root)
    warnings += [*more, *unused, *base_warnings, *_checkpoints(folder)]
    adapter = Adapter(name, folder, kind_name, "peft", config, tensors, base)
    warnings += kind.check_tensors(adapter)
    return Adapter(name, folder, kind_name, "peft", config, tensors, base, tuple(warnings))


def _kind_of(config: Mapping[str, Any], file: Path) -> tuple[ModuleType, str]:
    """Return the module and the name of the kind that a config is of."""
    known = ", ".join(known_kinds())
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise AdapterError(
            f"{file} has no peft_type: it was not saved by peft", hint=f"known kinds of adapter: {known}"
        )
    found = kind_of("peft", config)
    if found is None:
        raise AdapterError(
            f"{file}: peft_type {peft_type!r} is not supported",
            hint=f"known kinds of adapter: {known}; peft's save_as_lora converts some other kinds to lora",
        )
    return found


def _base(config: Mapping[str, Any], folder: Path, root: Path) -> tuple[BaseReference, list[str]]:
    """Return what the adapter says of its base, from the stamp where there is one (its own, else its parent's)."""
    name, revision = (_text(config, key, folder) for key in ("base_model_name_or_path", "revision"))
    found = find_fingerprint(folder, root, name, revision)
    if found.fingerprint is not None:
        return found, []
    warnings = ["no base_fingerprint.json: only the base's module names and shapes can be checked"]
    if name is None:
        warnings.append("base_model_name_or_path is null: the adapter does not say which base it was trained on")
    elif revision is None:
        warnings.append(f"revision is null: any revision of base {name!r} loads alike")
    return found, warnings


def _text(config: Mapping[str, Any], key: str, folder: Path) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise AdapterError(
            f"{folder / peft_files.CONFIG}: {key} is {value!r}, not text or null", hint="correct it in the file"
        )
    return value or None


def _checkpoints(folder: Path) -> list[str]:
    found = sorted(item.name for item in folder.iterdir() if item.is_dir() and peft_files.is_checkpoint(item))
    return [f"not read: the trainer's checkpoints {', '.join(found)}"] if found else []
