"""What the training scripts share: loading a base through edgeadapt, and saving an adapter as it ships."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.fingerprint import stamp_base


def tokenizer_of(base: BaseModel) -> Any:
    """The transformers tokenizer of a base, from the files that travel with it (repaired if it came from a GGUF)."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in base.assets.items():
            (Path(folder) / name).write_bytes(content)
        return AutoTokenizer.from_pretrained(folder)


def save_adapter(model: Any, folder: Path, base_name: str, *, dtype: torch.dtype) -> None:
    """Save the adapter of a PeftModel in `folder` with `dtype` tensors and settings that are the same at every run."""
    model.peft_config["default"].base_model_name_or_path = base_name
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data.to(dtype)
    # No look at the hub for a changed vocabulary: the embedding is never trained here.
    model.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # peft keeps target_modules as a set, whose order differs from run to run.
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(settings.get(key), list):
            settings[key] = sorted(settings[key])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stamp(folder: Path, base: BaseModel, base_name: str, *, without: tuple[str, ...] = ()) -> None:
    """Write the base's fingerprint beside the adapter, without heads that the base itself does not have."""
    own = {
        path: m for path, m in base.modules.items() if f"{path}.weight" not in base.untrained and path not in without
    }
    stamp_base(folder, replace(base, name=base_name, modules=own))
