"""Task-Adapted Attention, arXiv 2308.12372; the authors' `TAA`, `WindowAttention` and `TaskScaledNorm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.errors import MergeError
from edgeadapt.merging.own_layout import submodule, tensors_at

Tensors = Mapping[str, torch.Tensor]


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapter of one task into `model`."""
    embedding = tensors_at(adapter, "task_type_embeddings")["weight"][adapter.task_id or 0]
    for path in adapter.config["modules"]:
        added = _added(tensors_at(adapter, path), embedding)
        submodule(model, path).register_forward_pre_hook(_to_the_scores(path, added), with_kwargs=True)
    for path in adapter.config.get("norms", []):
        tensors = tensors_at(adapter, path)
        weight = _film(tensors, "ln_weight_modulation.gb_weights", embedding, tensors["weight"])
        submodule(model, path).register_forward_hook(_normed(weight, tensors["bias"]))


def _film(tensors: Tensors, name: str, embedding: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a value, scaled and shifted along its last axis as the task says."""
    gamma, beta = linear(embedding, tensors[f"{name}.weight"], tensors[f"{name}.bias"]).chunk(2, dim=-1)
    return (1 + gamma) * value + beta


def _added(tensors: Tensors, embedding: torch.Tensor) -> torch.Tensor:
    """Return [tokens, tokens]."""
    learned = tensors["random_weight_matrix"]
    tokens = learned.shape[0]
    blocks = _film(tensors, "taa_attn.gb_weights", embedding, learned).chunk(embedding.shape[0] // tokens, dim=0)
    square: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return square[:, :tokens]


def _to_the_scores(path: str, added: torch.Tensor) -> Any:
    """Return a hook that gives an attention a mask, which it adds to its scores, with the task's matrix in it."""

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(("hidden_states", "attention_mask", "head_mask", "output_attentions"), args, strict=False))
        given |= kwargs
        tokens = given["hidden_states"].shape[1]
        if tokens != added.shape[0]:
            raise MergeError(
                f"task_adapted_attention: a window of {path} has {tokens} tokens, the adapter is for {added.shape[0]}",
                hint="give the base that the adapter was trained on, and pictures of its size",
            )
        mask = given.get("attention_mask")
        return (), {**given, "attention_mask": added[None] if mask is None else mask + added}

    return hook


def _normed(weight: torch.Tensor, bias: torch.Tensor) -> Any:
    def hook(module: Any, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> torch.Tensor:
        return layer_norm(args[0], weight.shape, weight, bias, module.eps)

    return hook
