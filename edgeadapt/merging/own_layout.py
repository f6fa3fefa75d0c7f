"""What an adapter in edgeadapt's own layout really computes: its paper's equations in torch, on a copy of the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import nn

from edgeadapt import registry
from edgeadapt.adapters.adapter import Adapter
from edgeadapt.errors import MergeError
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.graft import follow_rows, owner_of, set_parameter, share

FORWARDS = "edgeadapt.merging.forwards"
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": nn.functional.leaky_relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "linear": lambda x: x,
}


def own_module(base: BaseModel, adapter: Adapter) -> nn.Module:
    """Return a copy of the base's module (over the same weights) with the adapter inside, in eval mode.

    Raises:
        MergeError: if there is no torch form of this kind, or the base has not the modules that the adapter names.
    """
    forward = registry.load(FORWARDS, adapter.kind, MergeError)
    module = share(base.module)
    for path in adapter.config.get("modules_to_save", []):
        for part in ("weight", "bias"):
            if (tensor := adapter.tensors.get(f"{path}.{part}")) is not None:
                owner, attribute = owner_of(module, f"{path}.{part}")
                old = owner._parameters[attribute]  # noqa: SLF001
                assert old is not None
                follow_rows(module, int(old.shape[0]), int(tensor.shape[0]))
                set_parameter(owner, attribute, torch.from_numpy(np.array(tensor.read())))
    forward.attach(module, adapter)
    module.eval().requires_grad_(requires_grad=False)
    return module


def submodule(module: nn.Module, path: str) -> nn.Module:
    """Return a module by its path.

    Raises:
        MergeError: if there is none.
    """
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise MergeError(
            f"{type(module).__name__} has no module {path!r}, which the adapter names",
            hint="give the base that the adapter was trained on, loaded for the same task",
        ) from error


def tensors_at(adapter: Adapter, path: str) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors at one module, by part."""
    return {
        key.removeprefix(f"{path}."): torch.from_numpy(np.array(tensor.read()))
        for key, tensor in adapter.tensors.items()
        if key.startswith(f"{path}.")
    }
