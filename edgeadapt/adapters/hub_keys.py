"""The keys of AdapterHub's tensors: what belongs to which method, and what to a prediction head."""

from __future__ import annotations

import re
from collections.abc import Collection

from edgeadapt.adapters.adapter import Adapter, TensorRef
from edgeadapt.errors import AdapterError

CONTAINERS = (
    *("adapters", "loras", "shared_parameters", "invertible_adapters", "prefix_tunings", "prefix_gates", "refts"),
)
"""Where a model keeps its adapters by name, as far as the kinds of adapter that are read have any."""
FUSIONS = "adapter_fusion_layer"
"""Where a model keeps its fusions by name."""


def key_without(name: str, key: str, containers: Collection[str] = CONTAINERS) -> str | None:
    """Return a saved tensor's key without the name of its adapter, None if it does not hold it behind a container."""
    match = re.fullmatch(rf"((?:.+\.)?(?:{'|'.join(containers)}))\.{re.escape(name)}\.(.+)", key)
    return None if match is None else f"{match[1]}.{match[2]}"


def is_of_head(key: str) -> bool:
    """Tell whether a normalized key is of a prediction head."""
    return not is_in((*CONTAINERS, FUSIONS), key)


def is_in(containers: Collection[str], key: str) -> bool:
    """Tell whether a normalized key is of one of these containers."""
    return any(part in containers for part in key.split("."))


def head_tensors(adapter: Adapter) -> dict[str, TensorRef]:
    """Return the tensors of an adapter's prediction head by normalized key."""
    return {key: tensor for key, tensor in adapter.tensors.items() if is_of_head(key)}


def check_method(adapter: Adapter, containers: Collection[str]) -> None:
    """Check that an adapter's own tensors are those of one method.

    Raises:
        AdapterError: there are none, or one is of another method, empty or of integers.
    """
    again = "save the adapter again with save_adapter"
    own = {key: tensor for key, tensor in adapter.tensors.items() if not is_of_head(key)}
    if not own:
        raise AdapterError(f"{adapter.path} holds no tensor of its {adapter.kind} adapter", hint=again)
    for key, tensor in own.items():
        if not is_in(containers, key):
            raise AdapterError(f"tensor {tensor.key!r} in {tensor.file} does not fit its config", hint=again)
    for tensor in adapter.tensors.values():
        if 0 in tensor.shape or not tensor.dtype.startswith(("F", "BF")):
            raise AdapterError(
                f"tensor {tensor.key!r} in {tensor.file} is {tensor.dtype}{list(tensor.shape)}, not floating point "
                "numbers",
                hint=again,
            )
