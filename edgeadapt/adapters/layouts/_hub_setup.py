"""Compositions of adapters as AdapterHub saves them: which adapters, how they are put together, and which head.

`save_adapter_setup` writes adapter_setup.json beside a folder for each adapter and each fusion; `save_adapter_fusion`
writes adapter_fusion_config.json with model_adapter_fusion.safetensors (or pytorch_model_adapter_fusion.bin), whose
adapters are then looked for in that folder and beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeadapt.adapters.adapter import Adapter, TensorRef
from edgeadapt.adapters.hub_keys import FUSIONS, is_of_head, key_without
from edgeadapt.errors import AdapterError

SETUP = "adapter_setup.json"
FUSION = "adapter_fusion_config.json"
FUSION_TENSORS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
_DEPTH = 3  # the library nests no deeper
_AGAIN = "save it again with save_adapter_setup"

Head = Callable[[Path], tuple[dict[str, Any], dict[str, TensorRef]]]
Part = Callable[[str, Path, Path], Adapter]
Read = Callable[[Path, tuple[str, str]], dict[str, TensorRef]]


def is_setup(folder: Path) -> bool:
    """Tell whether `folder` holds a composition or a fusion."""
    return (folder / SETUP).is_file() or (folder / FUSION).is_file()


def setup_config(folder: Path) -> dict[str, Any]:
    """Return a composition as the config of one adapter; its parts are not read yet.

    Raises:
        AdapterError: the file is damaged, or names what cannot be an adapter.
    """
    if (folder / SETUP).is_file():
        file, data = folder / SETUP, _json(folder / SETUP)
        tree, head = _node(data.get("adapter_setup"), file, 0), data.get("head_setup")
    else:
        file, data = folder / FUSION, _json(folder / FUSION)
        names = data.get("adapter_names", data.get("name"))
        names = names.split(",") if isinstance(names, str) else names
        singles = [{"type": "single", "children": [name]} for name in names] if isinstance(names, list) else None
        tree, head = _node({"type": "Fuse", "children": singles}, file, 0), None
    if isinstance(tree, str):
        tree = {"type": "Stack", "children": [tree]}
    return {"config": {"architecture": "setup"}, "name": folder.name, "setup": tree, "head_setup": head}


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not JSON: {error}", hint="copy or download the adapter again") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{file} is not a table", hint="copy or download the adapter again")
    return data


def _node(data: Any, file: Path, depth: int) -> Any:
    """Return an adapter's name, or {"type", "children"} and, where there are any, "kwargs"."""
    children = data.get("children") if isinstance(data, dict) else None
    if not isinstance(children, list) or not children or not isinstance(data.get("type"), str) or depth > _DEPTH:
        raise AdapterError(f"{file}: {data!r} is no composition of adapters", hint=_AGAIN)
    if data["type"] != "single":
        kwargs = {"kwargs": data["kwargs"]} if data.get("kwargs") else {}
        return {"type": data["type"], "children": [_node(child, file, depth + 1) for child in children], **kwargs}
    name = children[0]
    if len(children) > 1 or not isinstance(name, str) or not re.fullmatch(r"[^./\\,]+", name):
        raise AdapterError(f"{file}: {children!r} is not an adapter's name", hint=_AGAIN)
    return name


def names_in(node: Any) -> Iterator[str]:
    """Yield the names of a composition's adapters in order, each as often as it occurs."""
    if isinstance(node, str):
        yield node
        return
    for child in node["children"]:
        yield from names_in(child)


def blocks_in(node: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a composition's blocks, outer ones first."""
    if not isinstance(node, str):
        yield node
        for child in node["children"]:
            yield from blocks_in(child)


def fusion_name(block: Mapping[str, Any]) -> str:
    """Return what the library calls a fusion: the last adapter of each of its children."""
    return ",".join(list(names_in(child))[-1] for child in block["children"])


def read_setup(
    name: str, folder: Path, root: Path, config: dict[str, Any], readers: tuple[Part, Head, Read]
) -> Adapter:
    """Return a composition as one adapter whose `config["parts"]` are those that it is made of.

    A part's tensors are keyed "KEY@PART", a fusion's "PLACE.adapter_fusion_layer.WHAT@FUSION".

    Args:
        name: the adapter's.
        folder: where the composition is.
        root: where adapters were looked for.
        config: from `setup_config`.
        readers: of an adapter's folder, of a head's folder, and of a tensor file.

    Raises:
        AdapterError: an adapter, a fusion or the head is missing or damaged.
    """
    read_part, read_head, read_file = readers
    parts = {}
    for part in dict.fromkeys(names_in(config["setup"])):
        place = next((p for p in (folder / part, folder.parent / part) if p.is_dir()), folder / part)
        parts[part] = read_part(part, place, root)
        if parts[part].config.get("name") != part:
            raise AdapterError(
                f"{place} holds adapter {parts[part].config.get('name')!r}, the composition wants {part!r}", hint=_AGAIN
            )
    fusions = {}
    tensors: dict[str, TensorRef] = {}
    for block in blocks_in(config["setup"]):
        if block["type"] == "Fuse":
            fused = fusion_name(block)
            place = folder if (folder / FUSION).is_file() else folder / fused
            fusions[fused] = {"config": _json(place / FUSION).get("config"), "folder": place}
            tensors |= _of_fusion(read_file(place, FUSION_TENSORS), fused)
    for part, adapter in parts.items():
        tensors |= {f"{key}@{part}": tensor for key, tensor in adapter.tensors.items() if not is_of_head(key)}
    facts, head = _head_of(folder, config, parts, read_head)
    first = next(iter(parts.values()))
    warnings = tuple(dict.fromkeys(text for part in parts.values() for text in part.warnings))
    config = {**config, **facts, "parts": parts, "fusions": fusions}
    # fusions are saved in folders named "a,b", which no adapter in a bundle can be called
    return Adapter(
        *(name.replace(",", "-"), folder, "adapterhub_setup", "adapterhub", config, tensors | head, first.base),
        warnings=warnings,
    )


def _of_fusion(tensors: Mapping[str, TensorRef], fused: str) -> dict[str, TensorRef]:
    found = {}
    for key, tensor in tensors.items():
        short = key_without(fused, key, (FUSIONS,))
        if short is None:
            raise AdapterError(f"tensor {key!r} in {tensor.file} is not one of fusion {fused!r}", hint=_AGAIN)
        found[f"{short}@{fused}"] = tensor
    return found


def _head_of(
    folder: Path, config: Mapping[str, Any], parts: Mapping[str, Adapter], read_head: Head
) -> tuple[dict[str, Any], dict[str, TensorRef]]:
    """Return the facts and tensors of the head that the composition runs with.

    The library saves one with every adapter: a model's only head, the same each time, or each adapter's own.
    """
    wanted = config["head_setup"]
    if wanted is True or isinstance(wanted, str):
        return read_head(folder if wanted is True else folder / wanted)
    if wanted is not None:
        raise AdapterError(f"head_setup is {wanted!r}, more than one head", hint="save the composition with one head")
    heads = [(name, part) for name, part in parts.items() if "head" in part.config]
    if not heads:
        return {}, {}
    name, last = heads[-1]
    for other, part in heads[:-1]:
        if config["setup"]["type"] != "Stack" and not _same(part, last):
            raise AdapterError(
                f"adapters {other!r} and {name!r} have heads of their own: which one the composition runs with is not "
                "said",
                hint="save it with head_setup, or its adapters with with_head=False",
            )
    facts = {key: last.config[key] for key in ("head", "task_type", "modules_to_save") if key in last.config}
    return facts, {key: tensor for key, tensor in last.tensors.items() if is_of_head(key)}


def _same(one: Adapter, other: Adapter) -> bool:
    mine, theirs = ({k: t for k, t in a.tensors.items() if is_of_head(k)} for a in (one, other))
    return mine.keys() == theirs.keys() and all((mine[k].read() == theirs[k].read()).all() for k in mine)
