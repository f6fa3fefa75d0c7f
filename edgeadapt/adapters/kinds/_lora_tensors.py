"""The names of LoRA's tensors: module path and part ("lora_A.weight", "base_layer.bias", "weight")."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from edgeadapt.adapters.adapter import TensorRef

LORA_TERMS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
# Buffers and samplers of VeLoRA and MonteCLoRA: their forward after training is plain LoRA's.
_TRAINING_STATE = ("lora_velora_", "lora_monteclora_")
_KEY = re.compile(r"(?P<module>.*?)\.(?P<part>(?:lora_\w+|base_layer)(?:\..+)?)")


def split_key(key: str) -> tuple[str, str]:
    """Return the module path and the part of a normalized key."""
    match = _KEY.fullmatch(key)
    if match is not None:
        return match["module"], match["part"].replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    module, _, part = key.rpartition(".")
    return module, part


def split_keys(tensors: Mapping[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """Return the tensors by module path and part, without what only training needs."""
    result: dict[str, dict[str, TensorRef]] = {}
    for key, tensor in tensors.items():
        if not is_training_state(key):
            module, part = split_key(key)
            result.setdefault(module, {})[part] = tensor
    return result


def factor_keys(parts: Iterable[str]) -> set[str]:
    """Return the parts that are LoRA's own."""
    return {part for part in parts if part.startswith("lora_")}


def is_training_state(key: str) -> bool:
    """Tell whether a tensor is only needed to train on."""
    return split_key(key)[1].startswith(_TRAINING_STATE)
