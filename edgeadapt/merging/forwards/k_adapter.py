"""K-Adapter, arXiv 2002.01808, section 3.1 and figure 2; the authors' `Adapter`, `AdapterModel` and `ETModel`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.errors import MergeError
from edgeadapt.merging.own_layout import ACTIVATIONS, submodule, tensors_at

Tensors = Mapping[str, torch.Tensor]


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapter into `model`."""
    config, seen = adapter.config, dict[str, torch.Tensor]()
    for path in config["modules"]:
        submodule(model, path).register_forward_hook(_keep(seen, path))
    names = config.get("knowledge") or [""]
    parts = [
        [(path, tensors_at(adapter, f"{path}.{name}" if name else path)) for path in config["modules"]]
        for name in names
    ]
    join = tensors_at(adapter, config["last"])

    def hook(_module: nn.Module, _args: tuple[Any, ...], hidden: torch.Tensor) -> torch.Tensor:
        if missing := [path for path in config["modules"] if path not in seen]:
            raise MergeError(
                f"K-Adapter: the model runs {missing[0]!r} after {config['last']!r}, or not at all",
                hint="name modules in adapter_config.json in the order in which the model runs them",
            )
        outputs = [_run(part, seen, config) for part in parts]
        seen.clear()
        if config.get("fusion", "concat") == "add":
            return hidden + torch.stack(outputs).sum(dim=0)
        if not config.get("knowledge"):
            return _linear(torch.cat([hidden, outputs[0]], dim=-1), join, "com_dense")
        features = [
            _linear(torch.cat([hidden, output], dim=-1), join, f"task_dense_{name}")
            for name, output in zip(names, outputs, strict=True)
        ]
        return _linear(torch.cat(features, dim=-1), join, "task_dense")

    submodule(model, config["last"]).register_forward_hook(hook)


def _keep(seen: dict[str, torch.Tensor], path: str) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
        seen[path] = output

    return hook


def _run(part: Sequence[tuple[str, Tensors]], seen: Tensors, config: Mapping[str, Any]) -> torch.Tensor:
    """Return the last adapter's output: each reads the base's hidden state and the output of the one before."""
    last = torch.zeros_like(seen[part[0][0]])
    for path, tensors in part:
        fused = seen[path] + last
        x = _linear(fused, tensors, "down_project")
        index = 0
        while f"encoder.layer.{index}.output.dense.weight" in tensors:
            x = _layer(x, tensors, f"encoder.layer.{index}", config)
            index += 1
        last = fused + _linear(x, tensors, "up_project")
    return last


def _layer(x: torch.Tensor, tensors: Tensors, prefix: str, config: Mapping[str, Any]) -> torch.Tensor:
    """Return what one of BERT's layers makes of [batch, tokens, width]; all tokens attend to all."""
    heads, eps = int(config["heads"]), float(config.get("layer_norm_eps", 1e-5))

    def split(name: str) -> torch.Tensor:
        whole = _linear(x, tensors, f"{prefix}.attention.self.{name}")
        return whole.reshape(*whole.shape[:2], heads, -1).transpose(1, 2)

    query, key, value = split("query"), split("key"), split("value")
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)

    def normed(change: torch.Tensor, residual: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = tensors[f"{prefix}.{name}.weight"], tensors[f"{prefix}.{name}.bias"]
        return layer_norm(change + residual, weight.shape, weight, bias, eps)

    x = normed(_linear(mixed, tensors, f"{prefix}.attention.output.dense"), x, "attention.output.LayerNorm")
    activation = ACTIVATIONS[config.get("activation", "gelu")]
    wide = activation(_linear(x, tensors, f"{prefix}.intermediate.dense"))
    return normed(_linear(wide, tensors, f"{prefix}.output.dense"), x, "output.LayerNorm")


def _linear(x: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    return linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
