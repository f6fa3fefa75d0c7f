"""Adapters in edgeadapt's own layout, for training code that no library saves for; docs/formats/adapter-folder.md.

A folder holds adapter_config.json with `edgeadapt_type` (a kind), and adapter.safetensors with a tensor
"<module path>.<part>" for each part at each of the config's `modules`, and those of `modules_to_save` whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeadapt.adapters.adapter import Adapter, BaseReference
from edgeadapt.adapters.fingerprint import FILE_NAME as FINGERPRINT
from edgeadapt.adapters.fingerprint import find_fingerprint
from edgeadapt.adapters.kind import kind_of, known_kinds
from edgeadapt.adapters.peft_files import CONFIG, read_config
from edgeadapt.adapters.safetensors_file import read_tensors
from edgeadapt.errors import AdapterError

LAYOUT = "edgeadapt"
TYPE = "edgeadapt_type"
TENSORS = "adapter.safetensors"


def holds(folder: Path) -> bool:
    """Tell whether `folder` has a config of this layout."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and TYPE in config


def read(name: str, folder: Path, root: Path) -> Adapter:
    """Return the adapter in `folder`; see `edgeadapt.adapters.read`."""
    config = read_config(folder)
    file = folder / CONFIG
    try:
        kind, kind_name = _kind_of(config)
        base, more = _base(config, folder, root)
        warnings: list[str] = [*kind.check(config), *more]
    except AdapterError as error:
        raise AdapterError(f"{file}: {error.message}", hint=error.hint) from error
    if not (folder / TENSORS).is_file():
        raise AdapterError(f"{folder} has {CONFIG} but no {TENSORS}", hint="copy it from where it was trained")
    tensors = read_tensors(folder / TENSORS)
    adapter = Adapter(name, folder, kind_name, LAYOUT, config, tensors, base)
    warnings += kind.check_tensors(adapter)
    return Adapter(name, folder, kind_name, LAYOUT, config, tensors, base, tuple(warnings))


def _kind_of(config: Mapping[str, Any]) -> tuple[ModuleType, str]:
    found = kind_of(LAYOUT, config)
    if found is None:
        raise AdapterError(
            f"{TYPE} {config[TYPE]!r} is not supported", hint=f"known kinds of adapter: {', '.join(known_kinds())}"
        )
    return found


def _base(config: Mapping[str, Any], folder: Path, root: Path) -> tuple[BaseReference, list[str]]:
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    for key, value in (("base_model_name_or_path", name), ("revision", revision)):
        if value is not None and not isinstance(value, str):
            raise AdapterError(f"{key} is {value!r}, not text or null", hint="write the name of the base, or null")
    found = find_fingerprint(folder, root, name, revision)
    if found.fingerprint is not None:
        return found, []
    return found, [f"no {FINGERPRINT}: only the base's module names and shapes can be checked"]
