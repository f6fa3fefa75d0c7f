"""CLIP-Adapter, arXiv 2110.04544: a relu(relu(f W1) W2) + (1 - a) f; the authors' `Adapter` and `CustomCLIP`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.merging.own_layout import submodule, tensors_at


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapter into `model`."""
    for path in adapter.config["modules"]:
        hook = _hook(tensors_at(adapter, path), float(adapter.config.get("ratio", 0.2)))
        submodule(model, path).register_forward_hook(hook)


def _hook(tensors: Mapping[str, torch.Tensor], ratio: float) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], features: torch.Tensor) -> torch.Tensor:
        narrow = torch.relu(nn.functional.linear(features, tensors["fc.0.weight"]))
        adapted = torch.relu(nn.functional.linear(narrow, tensors["fc.2.weight"]))
        return ratio * adapted + (1 - ratio) * features

    return hook
