"""Prediction heads that AdapterHub saved, as the base's own parameters.

A model with one head saves it under the base's names. A model with heads by name (`AutoAdapterModel`) saves a stack of
layers; where the base's own head for the task is the same stack, it is that head with other numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, TargetModule, TensorRef
from edgeadapt.adapters.base_copy import is_base_copy
from edgeadapt.adapters.fingerprint import base_label
from edgeadapt.errors import AdapterError

_RIGHT_BASE = "give the base that the adapter was trained on, loaded for the same task"


class _Stack(NamedTuple):
    """A head of a base: its linear layers, what is between them, and modules that tell its base from others."""

    head_type: str
    pooled: bool
    layers: tuple[str, ...]
    activation: str | None
    absent: str | None = None
    present: str | None = None


_STACKS = (
    _Stack("classification", False, ("pooler.dense", "classifier"), "tanh"),  # BERT
    _Stack("classification", True, ("classifier",), None),
    _Stack("classification", False, ("classifier.dense", "classifier.out_proj"), "tanh"),  # RoBERTa
    _Stack("classification", False, ("pre_classifier", "classifier"), "relu"),  # DistilBERT
    _Stack("tagging", False, ("classifier",), None, absent="pooler.dense"),
    _Stack("question_answering", False, ("qa_outputs",), None),
    _Stack("causal_lm", False, ("lm_head",), None),
    _Stack("image_classification", False, ("classifier",), None, present="vit.layernorm"),
)
_SAME_LOGITS = {"multilabel_classification": "classification"}
"""Types of head that differ from another in training alone."""


def resolve_head(
    adapter: Adapter, tensors: Mapping[str, TensorRef], modules: Mapping[str, TargetModule], base_name: str | None
) -> dict[str, Array]:
    """Return the base's parameters that a head replaces, float32 by name; none for the base's own values.

    Args:
        adapter: the head's.
        tensors: the head's, by normalized key.
        modules: the base's.
        base_name: for messages.

    Raises:
        AdapterError: the base has no such head.
    """
    config = (adapter.config.get("head") or {}).get("config")
    if config:
        return _stack(config, tensors, modules, base_name)
    replaced = {}
    for key, tensor in tensors.items():
        path, _, part = key.rpartition(".")
        module = modules.get(path)
        shape = None if module is None else _shape(module, part)
        if module is None or shape is None or shape[1:] != tensor.shape[1:] or len(shape) != len(tensor.shape):
            raise AdapterError(
                f"head tensor {tensor.key!r} {list(tensor.shape)} has no use in {base_label(base_name)} "
                f"({'no such parameter' if shape is None else f'its own is {list(shape)}'})",
                hint=_RIGHT_BASE,
            )
        if not _is_own(tensor, module, part):
            replaced[key] = tensor.read()
    return replaced


def _shape(module: TargetModule, part: str) -> tuple[int, ...] | None:
    if part == "weight":
        return module.weight_shape
    return (module.out_features,) if part == "bias" and module.has_bias else None


def _is_own(tensor: TensorRef, module: TargetModule, part: str) -> bool:
    if part == "weight":
        return is_base_copy(tensor, module)
    return module.bias is not None and np.array_equal(module.bias(), tensor.read())


def _stack(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorRef],
    modules: Mapping[str, TargetModule],
    base_name: str | None,
) -> dict[str, Array]:
    """Return a head of layers in the places of the base's own."""
    if config.get("layer_norm") and config.get("layers") != 1:
        raise AdapterError(
            f"a head of type {config.get('head_type')!r} with a norm between its layers is not one that "
            f"{base_label(base_name)} has for its task",
            hint="save the adapter with with_head=False, or train it with the base's own head",
        )
    numbers = sorted({int(match[1]) for key in tensors if (match := re.fullmatch(r"heads\.(\d+)\.\w+", key))})
    known = {f"heads.{number}.{part}" for number in numbers for part in ("weight", "bias")}
    if not numbers or tensors.keys() - known or config.get("layers") != len(numbers):
        strange = sorted(tensors.keys() - known) or sorted(tensors)
        raise AdapterError(
            f"the head's tensors do not fit its config of {config.get('layers')!r} layers: {strange[0]!r}",
            hint="save the adapter again with save_adapter",
        )
    found = next((paths for stack in _STACKS if (paths := _fits(stack, config, len(numbers), modules))), None)
    if found is None:
        raise AdapterError(
            f"a head of type {config.get('head_type')!r} with {len(numbers)} layers, "
            f"{config.get('activation_function')!r} between them and use_pooler {bool(config.get('use_pooler'))} is "
            f"not one that {base_label(base_name)} has for its task",
            hint="save the adapter with with_head=False, or export it on a base with the same head",
        )
    replaced: dict[str, Array] = {}
    for number, path in zip(numbers, found, strict=True):
        weight, bias = tensors[f"heads.{number}.weight"], tensors.get(f"heads.{number}.bias")
        replaced |= _layer(modules[path], number, weight, bias)
    return replaced


def _layer(module: TargetModule, number: int, weight: TensorRef, bias: TensorRef | None) -> dict[str, Array]:
    """Return a layer of a head as the parameters of the base's own, none for its own values without a bias."""
    if weight.shape[1:] != module.weight_shape[1:]:
        raise AdapterError(f"the head's layer {number} reads {weight.shape[1]} values", hint=_RIGHT_BASE)
    if not module.has_bias:
        if bias is not None:
            raise AdapterError(
                f"the head's layer {number} has a bias, the base's {module.path!r} has none", hint=_RIGHT_BASE
            )
        return {} if is_base_copy(weight, module) else {f"{module.path}.weight": weight.read()}
    values = weight.read()
    zeros = np.zeros(len(values), np.float32)
    return {f"{module.path}.weight": values, f"{module.path}.bias": zeros if bias is None else bias.read()}


def _fits(
    stack: _Stack, config: Mapping[str, Any], layers: int, modules: Mapping[str, TargetModule]
) -> tuple[str, ...] | None:
    """Return the paths of the stack's layers in the base, None if it is another head."""
    same = (
        stack.head_type == _SAME_LOGITS.get(str(config.get("head_type")), config.get("head_type"))
        and len(stack.layers) == layers
        and stack.pooled == bool(config.get("use_pooler"))
        and stack.activation in (None, config.get("activation_function"))
    )
    if not same or (stack.absent is not None and _find(stack.absent, modules) is not None):
        return None
    if stack.present is not None and _find(stack.present, modules) is None:
        return None
    paths = tuple(_find(layer, modules) for layer in stack.layers)
    return tuple(path for path in paths if path is not None) if None not in paths else None


def _find(name: str, modules: Mapping[str, TargetModule]) -> str | None:
    """Return the one module of that name, at the top or below the base's own part."""
    found = [path for path in modules if path == name or (path.endswith(f".{name}") and path.count(".") <= 2)]
    return found[0] if len(found) == 1 else None
