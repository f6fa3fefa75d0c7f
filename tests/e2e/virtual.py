"""Adapters of virtual tokens, saved by the real peft library on tiny models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.e2e.tiny import DECODER

VOCAB = {"vocab_size": 272, "eos_token_id": None}
SMALL = {**DECODER, **VOCAB}
LM = {"task_type": "CAUSAL_LM"}
CONFIGS: Mapping[str, Callable[[], Any]] = {
    "prefix": lambda: PrefixTuningConfig(**LM, num_virtual_tokens=5),
    "projected": lambda: PrefixTuningConfig(**LM, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=32),
    "cartridge": lambda: CartridgeConfig(**LM, num_virtual_tokens=6, num_frozen_tokens=2),
    "prompt": lambda: PromptTuningConfig(**LM, num_virtual_tokens=4),
    "p-mlp": lambda: PromptEncoderConfig(**LM, num_virtual_tokens=3, encoder_hidden_size=32),
    "p-lstm": lambda: PromptEncoderConfig(
        **LM, num_virtual_tokens=7, encoder_hidden_size=32, encoder_reparameterization_type="LSTM"
    ),
    "multi": lambda: MultitaskPromptTuningConfig(**LM, num_virtual_tokens=4, num_tasks=2, num_ranks=2),
    "cpt": lambda: CPTConfig(
        **LM, cpt_token_ids=[5, 9, 11, 3, 8], cpt_mask=[1] * 5, cpt_tokens_type_mask=[1, 2, 2, 3, 4]
    ),
}
"""Every type that peft has, and both encoders of those that have two."""
EMBEDDED = ("prompt", "p-mlp", "p-lstm", "multi", "cpt")
"""Those whose tokens peft gives logits for."""


def save_base(model_class: Any, config: Any, folder: Path) -> Path:
    """Save a tiny random base that reads text, a token per byte; return the folder."""
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def save_virtual(model_class: Any, base: Path, name: str, folder: Path, **fields: Any) -> Path:
    """Let peft make virtual tokens with random values on a base, and save them; return the folder."""
    torch.manual_seed(sum(map(ord, name)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CONFIGS[name]()
        vars(config).update(fields)
        tuned = get_peft_model(model_class.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in tuned.prompt_encoder.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        tuned.save_pretrained(folder)
    return folder


def with_virtual(model_class: Any, base: Path, folder: Path) -> Any:
    """Return peft's own model with saved virtual tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class.from_pretrained(base, attn_implementation="eager")
        return PeftModel.from_pretrained(model, folder).eval()


def logits_of(model: Any, name: str, inputs: Mapping[str, Any], task: int | None = None) -> Any:
    """Return peft's logits of the user's tokens."""
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
    tasks = {} if task is None else {"task_ids": torch.full((len(tensors["input_ids"]),), task)}
    with torch.no_grad():
        found = model(**tensors, **tasks).logits
    return found[:, -tensors["input_ids"].shape[1] :].numpy()


def written_by(model: Any, ids: list[int], count: int, task: int | None = None) -> list[int]:
    """Return what peft's own greedy generate writes after `ids`."""
    tensor = torch.tensor([ids])
    tasks = {} if task is None else {"task_ids": torch.tensor([task])}
    settings = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(
            input_ids=tensor, attention_mask=torch.ones_like(tensor), generation_config=settings, **tasks
        )
    return found[0, -count:].tolist()
