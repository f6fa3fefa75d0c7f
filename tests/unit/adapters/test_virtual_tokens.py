"""Virtual tokens from peft's files: what is read without the base, and what is refused, with the whole message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import MultitaskPromptTuningConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from edgeadapt.adapters import read_adapters
from edgeadapt.adapters.adapter import Adapter
from edgeadapt.adapters.inspect import describe
from edgeadapt.adapters.resolve import resolve
from edgeadapt.errors import AdapterError

LM = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=8,
    )
    return transformers.LlamaForCausalLM(config)


def _save(config: Any, folder: Path) -> Any:
    tuned = get_peft_model(_base(), config)
    tuned.save_pretrained(folder)
    return tuned


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    _save(PrefixTuningConfig(**LM), tmp_path / "prefix")
    return tmp_path / "prefix"


def _one(folder: Path) -> Adapter:
    (adapter,) = read_adapters(folder)
    return adapter


def _edit_tensors(folder: Path, **changes: Any) -> None:
    tensors = {**load_file(folder / FILE), **changes}
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / FILE)


def _edit_config(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps(config))


def test_keys_and_values_are_those_that_peft_begins_with(tmp_path: Path) -> None:
    tuned = _save(PrefixTuningConfig(**LM), tmp_path / "prefix")
    with torch.no_grad():
        cache = tuned.get_prompt(1)
    resolved = resolve(_one(tmp_path / "prefix"), {})
    assert resolved.prefix is not None
    assert (resolved.prefix.tokens, len(resolved.prefix.keys), resolved.parameter_count) == (3, 2, 2 * 2 * 2 * 3 * 4)
    for layer, key, value in zip(cache.layers, resolved.prefix.keys, resolved.prefix.values, strict=True):
        assert np.array_equal(layer.keys[0], key)
        assert np.array_equal(layer.values[0], value)


def test_each_task_of_one_file_is_an_adapter(tmp_path: Path) -> None:
    _save(MultitaskPromptTuningConfig(**LM, num_tasks=2), tmp_path / "multi")
    found = read_adapters(tmp_path / "multi")
    assert {adapter.kind for adapter in found} == {"multitask_prompt_tuning"}
    assert [(adapter.name, adapter.task_id) for adapter in found] == [("multi-task0", 0), ("multi-task1", 1)]
    assert describe(found[1])["task_id"] == 1
    _save(MultitaskPromptTuningConfig(**LM, num_tasks=1), tmp_path / "single")
    assert [(adapter.name, adapter.task_id) for adapter in read_adapters(tmp_path / "single")] == [("single", 0)]


def test_embeddings_need_the_base(tmp_path: Path) -> None:
    _save(PromptTuningConfig(**LM), tmp_path / "prompt")
    adapter = _one(tmp_path / "prompt")
    assert describe(adapter)["needs_base_weights"]
    with pytest.raises(AdapterError) as caught:
        resolve(adapter, {})
    assert str(caught.value) == (
        "adapter 'prompt': PROMPT_TUNING holds embeddings: the float base must be run over them once, and a bundle "
        "does not hold it\nHint: pass the base with --base, or export the bundle again together with this adapter"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt_embeddings": np.zeros((3, 30), np.float32)},
            (
                "tensor 'prompt_embeddings' in {file} has shape [3, 30], its config needs [3, 32]\n"
                "Hint: copy the adapter_config.json that was saved with these tensors"
            ),
        ),
        (
            {"prompt_embeddings": np.zeros((3, 32), np.int64)},
            (
                "tensor 'prompt_embeddings' in {file} has dtype I64\n"
                "Hint: save the adapter in float32, float16 or bfloat16"
            ),
        ),
        (
            {"prompt_embeddings": None, "other": np.zeros(3, np.float32)},
            "tensor 'prompt_embeddings' is missing in {file}\nHint: save the adapter again with peft's save_pretrained",
        ),
        (
            {"base_model.model.lm_head.weight": np.zeros(3, np.float32)},
            (
                "tensor 'base_model.model.lm_head.weight' in {file} has no use in PREFIX_TUNING\n"
                "Hint: save the adapter again without it (save_embedding_layers=False)"
            ),
        ),
    ],
)
def test_wrong_tensors(changes: dict[str, Any], message: str, prefix: Path) -> None:
    _edit_tensors(prefix, **changes)
    with pytest.raises(AdapterError) as caught:
        read_adapters(prefix)
    assert str(caught.value) == message.format(file=prefix / FILE)


def test_values_that_are_not_finite(prefix: Path) -> None:
    values = np.zeros((3, 32), np.float32)
    values[1, 2] = np.nan
    _edit_tensors(prefix, prompt_embeddings=values)
    with pytest.raises(AdapterError) as caught:
        resolve(_one(prefix), {})
    assert str(caught.value) == (
        f"adapter 'prefix': tensor 'prompt_embeddings' in {prefix / FILE} holds values that are not finite: 1 of 96, "
        "the first at [1, 2]\nHint: the training diverged or the file is damaged: use an earlier checkpoint"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2},
            (
                "PREFIX_TUNING for task_type 'SEQ_2_SEQ_LM' with 2 transformer submodules: virtual tokens are held in "
                "the key-value cache of a decoder-only language model, and only such a model has one\n"
                "Hint: train LoRA for this task; virtual tokens are for task_type CAUSAL_LM"
            ),
        ),
        (
            {"task_type": "SEQ_CLS"},
            (
                "PREFIX_TUNING for task_type 'SEQ_CLS' with 1 transformer submodules: virtual tokens are held in the "
                "key-value cache of a decoder-only language model, and only such a model has one\n"
                "Hint: train LoRA for this task; virtual tokens are for task_type CAUSAL_LM"
            ),
        ),
        (
            {"modules_to_save": ["lm_head"]},
            (
                "modules_to_save is ['lm_head'] beside virtual tokens, which edgeadapt does not do\n"
                "Hint: train without modules_to_save"
            ),
        ),
        (
            {"num_virtual_tokens": "3"},
            "num_virtual_tokens is '3', not a whole number above 0\nHint: copy the file that peft wrote",
        ),
        ({"num_layers": None}, "num_layers is missing\nHint: copy the file that peft wrote"),
        (
            {"num_attention_heads": 3},
            "token_dim 8 is no multiple of num_attention_heads 3\nHint: copy the file that peft wrote",
        ),
        (
            {"prefix_gate": 0.5, "peft_version": "9.9"},
            (
                "unknown key 'prefix_gate' is set to 0.5 (saved by peft 9.9): it may change what is computed\n"
                "Hint: update edgeadapt, or remove the key if it has no effect after training"
            ),
        ),
    ],
)
def test_wrong_configs(changes: dict[str, Any], message: str, prefix: Path) -> None:
    _edit_config(prefix, **changes)
    with pytest.raises(AdapterError) as caught:
        read_adapters(prefix)
    assert str(caught.value) == f"{prefix / CONFIG}: {message}"
