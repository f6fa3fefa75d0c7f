"""Adapter folders to `Adapter`: files found, kind known, keys normalized, everything checked that needs no base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeadapt import registry
from edgeadapt.adapters import peft_files
from edgeadapt.adapters.adapter import Adapter, BaseReference
from edgeadapt.adapters.fingerprint import FILE_NAME as FINGERPRINT
from edgeadapt.adapters.fingerprint import read_fingerprint
from edgeadapt.adapters.safetensors_file import read_tensors
from edgeadapt.errors import AdapterError

KINDS = "edgeadapt.adapters.kinds"


def read_adapters(path: Path) -> tuple[Adapter, ...]:
    """Return every adapter in the folder `path`: its own, then those of its sub-folders by name.

    Tensors are not read yet, only the files' headers. An adapter's name is its folder's name; a file that holds
    several tasks gives an adapter for each ("NAME-task0").

    Raises:
        AdapterError: there is no adapter, its kind is unknown, or its files are damaged, incomplete or mean a
            computation that edgeadapt does not do.
    """
    path = Path(path)
    found = [_read_one(name, folder, path) for name, folder in peft_files.adapter_folders(path)]
    return tuple(adapter for one in found for adapter in _expanded(one))


def kind_module(name: str) -> ModuleType:
    """Return the module of an adapter kind.

    Raises:
        AdapterError: there is no such kind.
    """
    for file in registry.names(KINDS):
        module = registry.load(KINDS, file, AdapterError)
        if name in _kinds_in(module, file):
            return module
    raise AdapterError(f"unknown kind {name!r}", hint=f"known: {', '.join(known_kinds())}")


def known_kinds() -> dict[str, str]:
    """Return every kind of adapter and what it is, in one line, sorted by name."""
    found: dict[str, str] = {}
    for file in registry.names(KINDS):
        found |= _kinds_in(registry.load(KINDS, file, AdapterError), file)
    return dict(sorted(found.items()))


def _kinds_in(module: ModuleType, file: str) -> Mapping[str, str]:
    """Return the kinds of one file: those that it lists in `KINDS`, or the one that it is named after."""
    first_line = (module.__doc__ or "").partition("\n")[0]
    kinds: Mapping[str, str] = getattr(module, "KINDS", {file: first_line})
    return kinds


def _read_one(name: str, folder: Path, root: Path) -> Adapter:
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


def _expanded(adapter: Adapter) -> tuple[Adapter, ...]:
    expand = getattr(kind_module(adapter.kind), "expand", None)
    expanded: tuple[Adapter, ...] = (adapter,) if expand is None else expand(adapter)
    return expanded


def _kind_of(config: Mapping[str, Any], file: Path) -> tuple[ModuleType, str]:
    """Return the module and the name of the kind that a config is of."""
    known = ", ".join(known_kinds())
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise AdapterError(
            f"{file} has no peft_type: it was not saved by peft", hint=f"known kinds of adapter: {known}"
        )
    for name in registry.names(KINDS):
        module = registry.load(KINDS, name, AdapterError)
        if module.claims("peft", config):
            return module, module.kind_of(config) if hasattr(module, "KINDS") else name
    raise AdapterError(
        f"{file}: peft_type {peft_type!r} is not supported",
        hint=f"known kinds of adapter: {known}; peft's save_as_lora converts some other kinds to lora",
    )


def _base(config: Mapping[str, Any], folder: Path, root: Path) -> tuple[BaseReference, list[str]]:
    """Return what the adapter says of its base, from the stamp where there is one (its own, else its parent's)."""
    name, revision = (_text(config, key, folder) for key in ("base_model_name_or_path", "revision"))
    stamp = next((file for file in (folder / FINGERPRINT, root / FINGERPRINT) if file.is_file()), None)
    if stamp is not None:
        base = read_fingerprint(stamp)
        return BaseReference(base.name or name, base.revision or revision, base.fingerprint, base.quantization), []
    warnings = [f"no {FINGERPRINT}: only the base's module names and shapes can be checked"]
    if name is None:
        warnings.append("base_model_name_or_path is null: the adapter does not say which base it was trained on")
    elif revision is None:
        warnings.append(f"revision is null: any revision of base {name!r} loads alike")
    return BaseReference(name, revision), warnings


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
