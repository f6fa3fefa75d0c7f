"""Adapters that the library `adapters` (AdapterHub) saved with `save_adapter` or `save_all_adapters`.

A folder holds adapter_config.json (name, base and, under "config", the method's settings) with adapter.safetensors or
pytorch_adapter.bin; and, where a prediction head was saved, head_config.json with model_head.safetensors or
pytorch_model_head.bin. The adapter's name is inside every key; it is dropped here. A head's keys are the base's own
("classifier.weight") where the model has one head, and "heads.<index>.<part>" where it has heads by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeadapt.adapters.adapter import Adapter, BaseReference, TensorRef
from edgeadapt.adapters.fingerprint import FILE_NAME as FINGERPRINT
from edgeadapt.adapters.fingerprint import find_fingerprint
from edgeadapt.adapters.hub_keys import key_without
from edgeadapt.adapters.kind import kind_of, known_kinds
from edgeadapt.adapters.layouts._hub_setup import FUSION, SETUP, is_setup, read_setup, setup_config
from edgeadapt.adapters.peft_files import CONFIG, read_config
from edgeadapt.adapters.safetensors_file import read_tensors
from edgeadapt.adapters.torch_file import read_torch_tensors
from edgeadapt.errors import AdapterError

INTERFACE = "adapter_interface.json"
HEAD_CONFIG = "head_config.json"
TENSORS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_TENSORS = ("model_head.safetensors", "pytorch_model_head.bin")

_OTHERS = {"embedding.pt": "embeddings of its own"}
_TOP = frozenset(
    {
        *("interface", "head", "config", "config_id", "hidden_size"),
        *("model_class", "model_name", "model_type", "name", "version"),
    }
)
_TASKS = {
    "classification": "SEQ_CLS",
    "multilabel_classification": "SEQ_CLS",
    "ForSequenceClassification": "SEQ_CLS",
    "tagging": "TOKEN_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "causal_lm": "CAUSAL_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def holds(folder: Path) -> bool:
    """Tell whether `folder` has a config of AdapterHub's shape, or a composition of adapters."""
    if is_setup(folder):
        return True
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "peft_type" not in config and {"config", "model_type"} <= config.keys()


def is_whole(folder: Path) -> bool:
    """Tell whether the adapters in the sub-folders of `folder` are parts of one composition."""
    return (folder / SETUP).is_file()


def read(name: str, folder: Path, root: Path) -> Adapter:
    """Return the adapter in `folder`; see `edgeadapt.adapters.read`."""
    _refuse_others(folder, root)
    return _composition(name, folder, root) if is_setup(folder) else _single(name, folder, root)


def _composition(name: str, folder: Path, root: Path) -> Adapter:
    config = setup_config(folder)
    found = kind_of("adapterhub", config)
    assert found is not None  # there is such a kind
    kind, _ = found
    file = folder / (SETUP if is_whole(folder) else FUSION)
    try:
        warnings = kind.check(config)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error.message}", hint=error.hint) from error
    adapter = read_setup(name, folder, root, config, (_single, _head_in, _read_file))
    more = kind.check_tensors(adapter)
    return replace(adapter, warnings=(*warnings, *adapter.warnings, *more))


def _head_in(folder: Path) -> tuple[dict[str, Any], dict[str, TensorRef]]:
    head = _head_config(folder)
    if head is None:
        raise AdapterError(f"{folder} has no {HEAD_CONFIG}", hint="save the composition again with its head")
    tensors = _head_tensors(_read_file(folder, HEAD_TENSORS), head)
    return {"head": head, **_head_facts(head, tensors)}, tensors


def _single(name: str, folder: Path, root: Path) -> Adapter:
    head = _head_config(folder)
    config = {**read_config(folder), **_interface_of(folder), **({} if head is None else {"head": head})}
    file = folder / CONFIG
    try:
        _check_shape(config)
        kind, kind_name = _kind_of(config)
        warnings: list[str] = list(kind.check(config))
    except AdapterError as error:
        raise AdapterError(f"{file}: {error.message}", hint=error.hint) from error
    unused = sorted(config.keys() - _TOP)
    warnings += [f"{CONFIG}: {key} is not used (the library does not use it either)" for key in unused]
    tensors = _without_name(_read_file(folder, TENSORS), config["name"])
    if head is not None:
        facts, of_head = _head_in(folder)
        tensors |= of_head
        config = {**config, **facts}
    base, more = _base(config, folder, root)
    adapter = Adapter(name, folder, kind_name, "adapterhub", config, tensors, base)
    return Adapter(
        *(name, folder, kind_name, "adapterhub", config, tensors, base),
        warnings=(*warnings, *more, *kind.check_tensors(adapter)),
    )


def _refuse_others(folder: Path, root: Path) -> None:
    for name, what in _OTHERS.items():
        for place in (folder, root):
            if (place / name).is_file():
                raise AdapterError(
                    f"{place / name} says that this is {what}, which edgeadapt does not read yet",
                    hint="save one adapter alone with save_adapter, or give a copy of its folder without that file",
                )


def _interface_of(folder: Path) -> dict[str, Any]:
    """Return what adapter_interface.json says of a model that the library knows through a plugin interface alone.

    Raises:
        AdapterError: it is damaged.
    """
    file = folder / INTERFACE
    if not file.is_file():
        return {}
    try:
        interface = json.loads(file.read_bytes())["interface"]
        named = all(value is None or isinstance(value, str | list) for value in interface.values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        named = False
    if not named:
        raise AdapterError(f"{file} is no plugin interface", hint="copy or download the adapter again")
    return {"interface": interface}


def _check_shape(config: Mapping[str, Any]) -> None:
    """Check the fields that every method's config has."""
    settings = config.get("config")
    if not isinstance(settings, Mapping):
        raise AdapterError(f"config is {settings!r}, not a table of settings", hint="save the adapter again")
    if not isinstance(config.get("name"), str) or not re.fullmatch(r"[^.]+", config["name"]):
        raise AdapterError(f"name is {config.get('name')!r}, which no adapter can have", hint="save the adapter again")
    version = config.get("version", "")
    if not isinstance(version, str) or not re.fullmatch(r"(adapters\.\d[\w.+]*|\d[\w.+]*)?", version):
        raise AdapterError(
            f"version is {version!r}; only what AdapterHub's own libraries saved is read", hint="save the adapter again"
        )


def _kind_of(config: Mapping[str, Any]) -> tuple[ModuleType, str]:
    found = kind_of("adapterhub", config)
    if found is None:
        method = config["config"].get("architecture")
        raise AdapterError(
            f"architecture {method!r} is not supported: no such method is known here",
            hint=f"known kinds of adapter: {', '.join(known_kinds())}",
        )
    return found


def _head_config(folder: Path) -> dict[str, Any] | None:
    """Return head_config.json, None if no head was saved.

    Raises:
        AdapterError: it is damaged, or a head's tensors are there without it.
    """
    file = folder / HEAD_CONFIG
    if not file.is_file():
        for name in HEAD_TENSORS:
            if (folder / name).is_file():
                raise AdapterError(f"{folder} has {name} but no {HEAD_CONFIG}", hint="copy it from where it was saved")
        return None
    try:
        head = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not JSON: {error}", hint="copy or download the adapter again") from error
    if not isinstance(head, dict) or not isinstance(head.get("config") or {}, dict):
        raise AdapterError(f"{file} is not a head's config", hint="copy or download the adapter again")
    return head


def _read_file(folder: Path, names: tuple[str, str]) -> dict[str, TensorRef]:
    """Return the tensors of the safetensors file, or of the one that torch saved where there is no other."""
    safe, pickle = (folder / name for name in names)
    if safe.is_file():
        return read_tensors(safe)
    if pickle.is_file():
        return read_torch_tensors(pickle)
    raise AdapterError(f"{folder} has neither {names[0]} nor {names[1]}", hint="copy the file from where it was saved")


def _without_name(tensors: Mapping[str, TensorRef], name: str) -> dict[str, TensorRef]:
    """Return the tensors keyed without the adapter's name: "bert.encoder.layer.0.output.adapters.adapter_up.weight".

    Raises:
        AdapterError: a key does not hold the name behind a container of adapters.
    """
    found: dict[str, TensorRef] = {}
    for key, tensor in tensors.items():
        short = key_without(name, key)
        if short is None or short in found:
            raise AdapterError(
                f"tensor {key!r} in {tensor.file} is not one of adapter {name!r}",
                hint=f"the file and {CONFIG} do not belong together, or the adapter's name is part of another's: save "
                "it again under another name",
            )
        found[short] = tensor
    return found


def _head_tensors(tensors: Mapping[str, TensorRef], head: Mapping[str, Any]) -> dict[str, TensorRef]:
    prefix = f"heads.{head.get('name')}."
    return {re.sub(rf"^{re.escape(prefix)}", "heads.", key): tensor for key, tensor in tensors.items()}


def _head_facts(head: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> dict[str, Any]:
    """Return what a head says of the task, in the words of peft's configs, which `inspect` reads."""
    kind = (head.get("config") or {}).get("head_type")
    cls = str(head.get("model_class", ""))
    task = _TASKS.get(str(kind)) or next((task for end, task in _TASKS.items() if cls.endswith(end)), None)
    return {"task_type": task, "modules_to_save": sorted({key.rpartition(".")[0] for key in tensors})}


def _base(config: Mapping[str, Any], folder: Path, root: Path) -> tuple[BaseReference, list[str]]:
    name = config.get("model_name")
    found = find_fingerprint(folder, root, name if isinstance(name, str) and name else None, None)
    if found.fingerprint is not None:
        return found, []
    warnings = [f"no {FINGERPRINT}: only the base's module names and shapes can be checked"]
    if found.name is None:
        warnings.append("model_name is empty: the adapter does not say which base it was trained on")
    return found, warnings
