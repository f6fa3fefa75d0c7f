"""ST-Adapter, arXiv 2206.13559: x + W_up DWConv3D(W_down x) before attention or feed-forward; the authors' code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.merging.own_layout import submodule, tensors_at

_OUTPUTS = ("self_attn.out_proj", "attention.output.dense")


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapter into `model`."""
    config = adapter.config
    for path in config["modules"]:
        layer, kept = submodule(model, path), dict[str, torch.Tensor]()
        before = tensors_at(adapter, f"{path}.adapter_pre_attn") if config.get("pre_attn", True) else None
        layer.register_forward_pre_hook(_at_start(before, kept, config), with_kwargs=True)
        if config.get("pre_mlp", True):
            output = next(name for name in _OUTPUTS if hasattr(layer, name.partition(".")[0]))
            between = tensors_at(adapter, f"{path}.adapter_pre_mlp")
            submodule(layer, output).register_forward_hook(_behind_attention(between, kept, config))


def _at_start(tensors: Mapping[str, torch.Tensor] | None, kept: dict[str, torch.Tensor], config: Any) -> Any:
    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs["hidden_states"]
        if tensors is not None:
            x = x + _added(x, tensors, config)
        kept["tokens"] = x
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    return hook


def _behind_attention(tensors: Mapping[str, torch.Tensor], kept: dict[str, torch.Tensor], config: Any) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        return y + _added(y + kept["tokens"], tensors, config)

    return hook


def _added(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> torch.Tensor:
    """Return what is added to tokens [clips x frames, tokens, features]."""
    skipped, frames = int(config.get("skipped", 1)), int(config["frames"])
    narrow = nn.functional.linear(x[:, skipped:], tensors["fc1.weight"], tensors["fc1.bias"])
    pictures, tokens, width = narrow.shape
    clips = narrow.view(pictures // frames, frames, tokens, width).permute(0, 3, 1, 2)[..., None]
    kernel = tensors["conv.weight"].shape[2]
    mixed = nn.functional.conv3d(
        *(clips, tensors["conv.weight"], tensors["conv.bias"]), padding=(kernel // 2, 0, 0), groups=width
    )
    mixed = mixed[..., 0].permute(0, 2, 3, 1).reshape(pictures, tokens, width)
    wide = nn.functional.linear(mixed, tensors["fc2.weight"], tensors["fc2.bias"])
    return nn.functional.pad(wide, (0, 0, skipped, 0))
