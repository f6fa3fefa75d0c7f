"""The files that peft writes: adapter folders, adapter_config.json, tensor keys.

`save_pretrained` puts the adapter named "default" into the folder itself and every other one into a sub-folder of its
name. A key is `base_model.model.<module path>.<part>`; other trainers leave `module.`, `_orig_mod.`,
`_fsdp_wrapped_module.` or the adapter's name in it, and peft itself then loads nothing, with one warning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import TensorRef
from edgeadapt.errors import AdapterError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_LEADING = ("base_model.model.", "module.")
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def adapter_folders(root: Path, holds: Callable[[Path], bool]) -> tuple[tuple[str, Path], ...]:
    """Return the name and folder of every adapter in `root`: the folder itself, then its sub-folders by name.

    A trainer's `checkpoint-<step>` folders beside a finished adapter are not adapters of their own.

    Args:
        root: where to look.
        holds: whether a folder holds an adapter.

    Raises:
        AdapterError: there is no adapter at `root`.
    """
    if not root.is_dir():
        _refuse_no_folder(root)
    subs = sorted(item for item in root.iterdir() if holds(item))
    finished = [item for item in subs if not is_checkpoint(item)]
    if holds(root):
        name = root.resolve().name
        found = [(name, root), *((item.name, item) for item in finished)]
        if any(item.name == name for item in finished):
            raise AdapterError(f"{root} and its sub-folder {name!r} are two adapters of one name", hint="rename one")
        return tuple(found)
    if finished:
        return tuple((item.name, item) for item in finished)
    if subs:
        raise AdapterError(
            f"{root} holds only a trainer's checkpoints: {', '.join(item.name for item in subs)}",
            hint="give the folder of one checkpoint",
        )
    _refuse_empty_folder(root)
    return ()


def is_checkpoint(folder: Path) -> bool:
    """Tell whether `folder` is named like a checkpoint of transformers' Trainer."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def _refuse_no_folder(root: Path) -> None:
    if root.is_file():
        raise AdapterError(f"{root} is a file, not an adapter's folder", hint=f"give the folder that holds {CONFIG}")
    raise AdapterError(f"there is no adapter at {root}: no such folder", hint="check the path")


def _refuse_empty_folder(root: Path) -> None:
    if (root / TENSORS).is_file() or (root / PICKLE).is_file():
        raise AdapterError(
            f"{root} has no {CONFIG}", hint="copy it from where the adapter was trained: it holds alpha and the targets"
        )
    if (root / "config.json").is_file():
        raise AdapterError(f"{root} is a whole model, not an adapter (it has config.json)", hint="give it as --base")
    raise AdapterError(f"{root} holds no adapter: no {CONFIG} in it or its sub-folders", hint="check the path")


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json.

    Raises:
        AdapterError: it cannot be read or is no JSON object.
    """
    file = folder / CONFIG
    again = "copy or download the adapter again"
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror}", hint="check the file's permissions") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not JSON: {error}", hint=again) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} is not a JSON object", hint=again)
    return config


def tensor_file(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the folder's safetensors file, and warnings.

    Raises:
        AdapterError: there is none, or only a pickle.
    """
    file, pickle = folder / TENSORS, folder / PICKLE
    if file.is_file():
        return file, (f"{PICKLE} beside {TENSORS} is not read",) if pickle.is_file() else ()
    if pickle.is_file():
        raise AdapterError(
            f"{pickle} is a pickle, which can run any code when it is read",
            hint="convert it where you trust it: load it with torch.load(..., weights_only=True) and save it with "
            f"safetensors.torch.save_file as {TENSORS}",
        )
    raise AdapterError(f"{folder} has {CONFIG} but no {TENSORS}", hint="copy the file from where it was trained")


def normalize(tensors: Mapping[str, TensorRef], terms: frozenset[str]) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """Return the tensors keyed by module path and part, without prefixes and adapter names; and warnings.

    `terms` are the kind's containers that peft keys by the adapter's name ("lora_A"). `base_layer` stays in a key: it
    tells a base's own tensor from a saved module's.

    Raises:
        AdapterError: two keys become one although their tensors differ, or the file holds several adapters.
    """
    result: dict[str, TensorRef] = {}
    names: set[str] = set()
    warnings: list[str] = []
    for key, tensor in tensors.items():
        normal, name = _normal_key(key, terms)
        if name is not None:
            names.add(name)
        if ".original_module." in normal:
            # peft's bias="all" also saves the untrained copy beneath a saved module; the adapter never uses it
            warnings.append(f"tensor {key!r} is not used: it is the copy that the saved module replaces")
        elif normal in result and not _equal(result[normal], tensor):
            raise AdapterError(
                f"tensors {result[normal].key!r} and {key!r} in {tensor.file} are both {normal!r} and differ",
                hint="save the adapter again with peft's save_pretrained",
            )
        else:
            result.setdefault(normal, tensor)
    if len(names) > 1:
        raise AdapterError(
            f"{next(iter(tensors.values())).file} holds the tensors of several adapters: {', '.join(sorted(names))}",
            hint="save them one by one with peft's save_pretrained",
        )
    return result, tuple(warnings)


def _normal_key(key: str, terms: frozenset[str]) -> tuple[str, str | None]:
    """Return the normalized key, and the adapter's name if it was in the key."""
    while key.startswith(_LEADING):
        key = key.removeprefix(_LEADING[0]).removeprefix(_LEADING[1])
    parts = [part for part in key.split(".") if part not in _ANYWHERE]
    if "modules_to_save" in parts[:-1]:
        at = parts.index("modules_to_save")
        # raw: classifier.modules_to_save.<name>.weight; peft's bias="all" drops the name and keeps the wrapper's
        name = parts[at + 1] if len(parts) > at + 2 else None
        return ".".join(parts[:at] + parts[at + (1 if name is None else 2) :]), name
    at = next((i for i in reversed(range(len(parts))) if parts[i] in terms), len(parts))
    tail = parts[at + 1 :]
    parameter = tail[-1:] if tail[-1:] in (["weight"], ["bias"]) else []
    name = tail[0] if len(tail) - len(parameter) == 1 else None
    if name is not None:
        return ".".join([*parts[: at + 1], *parameter]), name
    return ".".join(parts), None


def _equal(one: TensorRef, other: TensorRef) -> bool:
    return one.shape == other.shape and bool(np.array_equal(one.read(), other.read()))
