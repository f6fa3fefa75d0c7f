"""What a bundle is compared with: peft's own forward in torch, on inputs with padding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel

Arrays = Mapping[str, np.ndarray]

CLASSES: dict[str, Any] = {
    "llama": transformers.LlamaForCausalLM,
    "llama-tied": transformers.LlamaForCausalLM,
    "bert": transformers.BertForSequenceClassification,
    "gpt2": transformers.GPT2LMHeadModel,
    "resnet": transformers.ResNetForImageClassification,
}
# Float32 sums in another order than torch's, relative to the largest value: processors differ by up to 2e-5.
CLOSE = 3e-5


def case(name: str) -> dict[str, np.ndarray]:
    """Return two rows, the second shorter; or two pictures."""
    generator = np.random.default_rng(11)
    if name == "resnet":
        return {"pixel_values": generator.standard_normal((2, 3, 32, 32)).astype(np.float32)}
    mask = np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    inputs = {"input_ids": generator.integers(3, 128, (2, 9)), "attention_mask": mask}
    return {**inputs, "token_type_ids": np.zeros_like(mask)} if name == "bert" else inputs


def base_model(name: str, folder: Path, **options: Any) -> Any:
    """Return the base in torch."""
    return CLASSES[name].from_pretrained(folder, attn_implementation="eager", **options)


def forward(model: Any, inputs: Arrays) -> np.ndarray:
    """Return the logits of a model in torch."""
    with torch.no_grad():
        output = model.eval()(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    return np.asarray(output.logits)


def with_peft(name: str, base: Path, adapter: Path, inputs: Arrays, **options: Any) -> np.ndarray:
    """Return the logits of the base with an adapter that peft itself has loaded, unmerged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return forward(PeftModel.from_pretrained(base_model(name, base, **options), adapter), inputs)


def error(expected: np.ndarray, found: np.ndarray, inputs: Arrays) -> float:
    """Return the largest difference at positions that are no padding, relative to the largest expected value."""
    assert expected.shape == found.shape
    if expected.ndim == 3:
        expected, found = expected[inputs["attention_mask"] == 1], found[inputs["attention_mask"] == 1]
    return float(np.abs(expected - found).max() / np.abs(expected).max())
