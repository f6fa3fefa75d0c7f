"""Tip-Adapter, arXiv 2111.03930: a exp(-b (1 - f F^T)) L beside f W^T; the authors' `run_tip_adapter`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.merging.own_layout import submodule, tensors_at


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapter into `model`."""
    (path,) = adapter.config["modules"]
    tensors = tensors_at(adapter, path)
    alpha, beta = float(adapter.config.get("alpha", 1.0)), float(adapter.config.get("beta", 5.5))

    def hook(_module: nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = args[0]
        features = x / x.norm(dim=-1, keepdim=True)
        affinity = features @ tensors["keys"].t()
        cache_logits: torch.Tensor = ((-1) * (beta - beta * affinity)).exp() @ tensors["values"]
        return logits + cache_logits * alpha

    submodule(model, path).register_forward_hook(hook)
