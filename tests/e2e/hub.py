"""Adapters saved by the real library `adapters` (AdapterHub) on tiny random models, and its own forward."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch

Arrays = Mapping[str, np.ndarray]


def save(model: Any, config: Any, folder: Path, *, name: str = "task", safe: bool = True, seed: int = 1) -> Path:
    """Let the library put an adapter on `model`, give it and the head random values, and save both; return the folder.

    Small random bottlenecks change little: their values are made large enough to matter.
    """
    logging.getLogger("adapters").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters.init(model)
        model.add_adapter(name, config=config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}." in key or ".shared_parameters." in key or _is_of_head(model, key):
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_adapter(str(folder), name, use_safetensors=safe)
    return folder


def _is_of_head(model: Any, key: str) -> bool:
    return not key.startswith(f"{model.base_model_prefix}.") and not key.startswith("lm_head")


def forward(model: Any, folder: Path | None, inputs: Arrays, *, safe: bool = True) -> np.ndarray:
    """Return the logits of a fresh `model` with the adapter in `folder` that the library itself has loaded."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapters.init(model)
        if folder is not None:
            name = model.load_adapter(str(folder), set_active=True, use_safetensors=safe)
            model.set_active_adapters(name)
        output = model.eval()(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    return np.asarray(output.logits)
