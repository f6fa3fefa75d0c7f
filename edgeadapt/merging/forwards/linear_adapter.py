"""Bottlenecks at modules' outputs: Houlsby et al., arXiv 1902.00751; with a norm of its own NeMo's `LinearAdapter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.merging.own_layout import ACTIVATIONS, submodule, tensors_at


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapter into `model`."""
    for path in adapter.config["modules"]:
        submodule(model, path).register_forward_hook(_hook(tensors_at(adapter, path), adapter.config))


def _hook(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Any:
    activation = ACTIVATIONS[config.get("activation", "silu")]
    scaling = float(config.get("scaling", 1.0))

    def hook(_module: nn.Module, _args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        v = y
        if "norm.weight" in tensors:
            v = nn.functional.layer_norm(v, v.shape[-1:], tensors["norm.weight"], tensors["norm.bias"])
        v = activation(nn.functional.linear(v, tensors["down.weight"], tensors.get("down.bias")))
        return y + scaling * nn.functional.linear(v, tensors["up.weight"], tensors.get("up.bias"))

    return hook
