"""The tensors of AdapterHub's ReFT: "<layer>.reft_layer.refts.units.<number>.<part>"; and the modules that end a layer.

A unit whose end of a text has no positions is saved too, and is used by nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, TargetModule, TensorRef
from edgeadapt.adapters.fingerprint import base_label
from edgeadapt.adapters.hub_keys import check_method
from edgeadapt.adapters.selection import name_some
from edgeadapt.errors import AdapterError

_KEY = re.compile(r"(?P<layer>.+\.(?P<index>\d+))\.reft_layer\.refts\.units\.(?P<unit>\d+)\.(?P<part>.+)")
_AGAIN = "save the adapter again with save_adapter"
_RIGHT_BASE = "give the base that the adapter was trained on, loaded for the same task"
_ORIGINAL, _BASE = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"
Unit = Mapping[str, TensorRef]


@dataclass(frozen=True)
class Tail:
    """How a layer ends in one family of models.

    module: the last module; reads: what a layer's output is there, the module's own or its sum with the residual
    """

    module: str
    reads: str


_TAILS = (
    Tail("output.LayerNorm", "output"),  # BERT, RoBERTa
    Tail("output_layer_norm", "output"),  # DistilBERT
    Tail("mlp.c_proj", "sum"),  # GPT-2
    Tail("mlp.down_proj", "sum"),  # Llama, Mistral, and decoders built like them
    Tail("output.dense", "sum"),  # ViT
)
_HEAD = "lm_head"
"""What a model has that writes texts."""


def layers_of(adapter: Adapter) -> dict[str, dict[int, Unit]]:
    """Return the units by number of each layer, which is named as in the model that was trained."""
    found: dict[str, dict[int, dict[str, TensorRef]]] = {}
    for key, tensor in adapter.tensors.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            found.setdefault(match["layer"], {}).setdefault(int(match["unit"]), {})[match["part"]] = tensor
    return {layer: dict(units) for layer, units in found.items()}


def check_units(adapter: Adapter) -> None:
    """Check that every layer has the tensors that the config asks for, and no others.

    Raises:
        AdapterError: a tensor is missing, unknown, empty, of integers or of a wrong shape.
    """
    check_method(adapter, ("refts",))
    settings = adapter.config["config"]
    rank = settings["r"]
    projection = (_ORIGINAL, _BASE) if settings["orthogonality"] else ("projection.weight",)
    axes = {"learned_source.weight": 2, "learned_source.bias": 1, **dict.fromkeys(projection, 2)}
    for key, tensor in adapter.tensors.items():
        if "refts" in key.split(".") and _KEY.fullmatch(key) is None:
            raise AdapterError(f"tensor {tensor.key!r} in {tensor.file} is of no layer", hint=_AGAIN)
    for layer, units in layers_of(adapter).items():
        for number in range(1 if settings.get("tied_weights") else 2):
            found = units.pop(number, {})
            place = f"{layer}.reft_layer.refts.units.{number}"
            if missing := axes.keys() - found.keys():
                raise AdapterError(f"tensor '{place}.{min(missing)}' is missing in {_file(adapter)}", hint=_AGAIN)
            _check_unit(found, axes, rank)
        for strange in (tensor for unit in units.values() for tensor in unit.values()):
            raise AdapterError(f"tensor {strange.key!r} in {strange.file} does not fit its config", hint=_AGAIN)


def _check_unit(unit: Unit, axes: Mapping[str, int], rank: int) -> None:
    features = unit["learned_source.weight"].shape[-1]
    for part, tensor in unit.items():
        if part not in axes:
            raise AdapterError(f"tensor {tensor.key!r} in {tensor.file} does not fit its config", hint=_AGAIN)
        wanted = (features, features) if part == _BASE else (rank, features)[: axes[part]]
        if tensor.shape != wanted:
            raise AdapterError(
                f"tensor {tensor.key!r} in {tensor.file} is {list(tensor.shape)}; with r = {rank} it would be "
                f"{list(wanted)}",
                hint=_AGAIN,
            )


def _file(adapter: Adapter) -> str:
    return str(next(iter(adapter.tensors.values())).file)


def tail_of(adapter: Adapter, modules: Mapping[str, TargetModule], base_name: str | None) -> Tail:
    """Return how the layers of the base end, once all of them that the settings name are known to have tensors.

    Raises:
        AdapterError: the base has no such layers, or is none that the adapter can be in.
    """
    settings = adapter.config["config"]
    layers = layers_of(adapter)
    numbers = {int(layer.rpartition(".")[2]) for layer in layers}
    tail = _find_tail(adapter, numbers, modules, base_name)
    if settings["suffix_positions"] and _HEAD in modules:
        raise AdapterError(
            f"suffix_positions is {settings['suffix_positions']}, and {base_label(base_name)} writes texts, in which a "
            "position is the last one only until the next token; with a key-value cache the library itself fails",
            hint="train it with suffix_positions=0",
        )
    pattern = re.compile(rf".+\.(\d+)\.{re.escape(tail.module)}")
    there = {int(match[1]) for path in modules if (match := pattern.fullmatch(path)) is not None}
    wanted = there if settings["layers"] == "all" else set(settings["layers"])
    stacks = {layer.rpartition(".")[0] for layer in layers}
    if numbers != wanted or len(stacks) != 1:
        strange = [str(number) for number in sorted(numbers ^ wanted)] or sorted(stacks)
        raise AdapterError(
            f"the adapter's tensors do not fit the layers of {base_label(base_name)}: {name_some(strange, str)} "
            f"(missing, or there against layers = {settings['layers']!r})",
            hint="the adapter's files are incomplete or damaged, or " + _RIGHT_BASE,
        )
    return tail


def _find_tail(adapter: Adapter, numbers: set[int], modules: Mapping[str, TargetModule], base_name: str | None) -> Tail:
    interface: Mapping[str, Any] | None = adapter.config.get("interface")
    known: tuple[Tail, ...] = _TAILS
    if interface is not None:
        # with attention and feed-forward side by side a layer's output is no module's with one residual
        parallel = interface.get("layer_pre_ffn") is None
        known = () if parallel else (Tail(str(interface.get("layer_output_proj")), "sum"),)
    for tail in known:
        if all(any(path.endswith(f".{number}.{tail.module}") for path in modules) for number in numbers):
            return tail
    raise AdapterError(
        f"the adapter changes the outputs of layers such as {min(layers_of(adapter))!r}; {base_label(base_name)} has "
        "no layers that are known to end in one module",
        hint="known are BERT and RoBERTa, DistilBERT, ViT, GPT-2, Llama and Mistral, and decoders built like them; "
        + _RIGHT_BASE,
    )


def source_of(adapter: Adapter, unit: Unit, module: TargetModule) -> tuple[Array, Array, Array]:
    """Return W float32[rank, features], b float32[rank] and R float32[rank, features] of a unit.

    Raises:
        AdapterError: the base has another width, or R cannot have orthogonal rows.
    """
    weight, bias = unit["learned_source.weight"], unit["learned_source.bias"]
    rank, features = weight.shape
    if features != module.out_features:
        raise AdapterError(
            f"tensor {weight.key!r} reads {features} values; the base's module {module.path!r} gives "
            f"{module.out_features}",
            hint=_RIGHT_BASE,
        )
    if not adapter.config["config"]["orthogonality"]:
        return weight.read(), bias.read(), unit["projection.weight"].read()
    if rank >= features:
        raise AdapterError(
            f"r is {rank} and the layers are {features} wide: so many orthogonal rows are made in another way",
            hint="train it with a smaller r, or without orthogonality",
        )
    return weight.read(), bias.read(), _orthogonal(unit[_ORIGINAL].read(), unit[_BASE].read())


def _orthogonal(original: Array, base: Array) -> Array:
    """Return float32[rank, features] as torch's `orthogonal` makes it of what it saves: `base` times reflections.

    Reflection i is 1 - tau v v^T, v with zeros before i, a 1 there, and below it column i of `original`; the signs are
    on its diagonal, cut down to whole numbers.
    """
    columns = original.T.astype(np.float64)
    product = np.eye(*columns.shape)
    for index in reversed(range(columns.shape[1])):
        v = np.where(np.arange(len(columns)) > index, columns[:, index], 0.0)
        tau = 2.0 / (1.0 + v @ v)
        v[index] = 1.0
        product -= tau * np.outer(v, v @ product)
    signs = np.trunc(np.diagonal(columns))
    return np.asarray((base.astype(np.float64) @ (product * signs)).T, np.float32)
