"""Write a LoRA of random values for a causal language model, where only its speed matters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def write_random_adapter(folder: Path, checkpoint: Path, *, rank: int, modules: Sequence[str], base_name: str) -> None:
    """Write a PEFT folder in float16 for the Llama-like model whose config.json lies in `checkpoint`."""
    from peft import LoraConfig
    from safetensors.numpy import save_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    shapes = module_shapes(config)
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name in modules:
            outputs, inputs = shapes[name]
            block = "self_attn" if name in ATTENTION else "mlp"
            key = f"base_model.model.model.layers.{layer}.{block}.{name}"
            down = rng.standard_normal((rank, inputs)) / np.sqrt(inputs)
            up = rng.standard_normal((outputs, rank)) * 1e-3
            tensors[f"{key}.lora_A.weight"] = down.astype(np.float16)
            tensors[f"{key}.lora_B.weight"] = up.astype(np.float16)
    folder.mkdir(parents=True)
    settings = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=list(modules))
    settings.base_model_name_or_path = base_name
    settings.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")


def module_shapes(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear of a layer."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = config["num_key_value_heads"] * head
    inner = config["intermediate_size"]
    return {
        "q_proj": (heads * head, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, heads * head),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
