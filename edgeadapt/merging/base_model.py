"""The base model: loaded once in float32 torch, with a fingerprint of every tensor that an adapter may touch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from edgeadapt.adapters.adapter import TargetModule


@dataclass(frozen=True)
class BaseModel:
    """A base in torch, float32, eval mode.

    name: hub id, folder name or class name, for people; revision: the hub commit, if known
    task: an optimum task name ("text-generation", "text-classification", "feature-extraction", ...), or "module"
        for a plain torch module
    model_type: transformers' model type ("llama"), or "module"
    modules: every module with a weight that an adapter may change, by module path
    assets: files that travel with the bundle, by file name ("config.json", "tokenizer.json", ...)
    example_inputs, dynamic_axes, output_names: only for a plain torch module: its forward's keyword arguments, which
        of their axes vary ({"pixel_values": {0: "batch"}}), and names for its outputs
    quantized_from: "nf4" if the weights were dequantized from an NF4 checkpoint
    max_length: the longest sequence to export for, None for what the model was trained for
    untrained: parameters that the checkpoint does not hold (a fresh classification head; set to zero)
    """

    module: torch.nn.Module
    name: str
    revision: str | None
    task: str
    model_type: str
    modules: Mapping[str, TargetModule]
    assets: Mapping[str, bytes] = field(default_factory=dict)
    example_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    output_names: tuple[str, ...] = ()
    quantized_from: str | None = None
    max_length: int | None = None
    untrained: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        """The transformers config, or None for a plain torch module."""
        return getattr(self.module, "config", None)
