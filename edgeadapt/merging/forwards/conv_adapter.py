"""Conv-Adapter, arXiv 2208.07463: h + a (W_up * f(W_down * h)); the authors' `ConvAdapter`, `Bottleneck.forward`."""

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
        tensors = tensors_at(adapter, path)
        convolution = submodule(model, path)
        if adapter.config.get("adds", "output") == "output":
            convolution.register_forward_hook(_at_output(tensors, adapter.config))
        else:
            # the layer that holds convolution, norm and activation gives what is added to
            kept: dict[str, torch.Tensor] = {}
            convolution.register_forward_hook(_keep(kept, tensors, adapter.config))
            submodule(model, path.rpartition(".")[0]).register_forward_hook(_add_kept(kept))


def _adapted(
    x: torch.Tensor, y: torch.Tensor, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> torch.Tensor:
    read = y if config.get("placement", "parallel") == "sequential" else x
    narrow = nn.functional.conv2d(
        *(read, tensors["conv1.weight"], tensors["conv1.bias"]),
        stride=config.get("stride", 1),
        padding=config.get("padding", 1),
        dilation=config.get("dilation", 1),
        groups=config["groups"],
    )
    narrow = ACTIVATIONS[config.get("activation", "relu")](narrow)
    return nn.functional.conv2d(narrow, tensors["conv2.weight"], tensors["conv2.bias"]) * tensors["se"]


def _at_output(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Any:
    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + _adapted(args[0], output, tensors, config)

    return hook


def _keep(kept: dict[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Any:
    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        kept["adapted"] = _adapted(args[0], output, tensors, config)

    return hook


def _add_kept(kept: dict[str, torch.Tensor]) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + kept.pop("adapted")

    return hook
