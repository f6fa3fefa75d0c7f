"""What virtual tokens leave in the base's cache, and bases that have no such cache."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from edgeadapt.adapters import read_adapters
from edgeadapt.adapters.resolve import resolve
from edgeadapt.errors import AdapterError, MergeError
from edgeadapt.merging import past
from edgeadapt.merging.library import PeftLibrary
from edgeadapt.merging.load import base_from_module, load_base_model
from edgeadapt.merging.reference import adapter_outputs

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LM = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
SHAPE = (2, 3, 8)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _saved(folder: Path, base: Path, config: object):
    torch.manual_seed(1)
    module = load_base_model(base, task="text-generation").module
    get_peft_model(module, config).save_pretrained(folder)
    (adapter,) = read_adapters(folder)
    return adapter


def test_a_prefix_is_what_the_file_holds(llama: Path, tmp_path: Path) -> None:
    adapter = _saved(tmp_path / "prefix", llama, PrefixTuningConfig(**LM))
    base = load_base_model(llama, task="text-generation")
    with_library = resolve(adapter, base.modules, library=PeftLibrary(base)).prefix
    alone = resolve(adapter, base.modules).prefix
    assert with_library is not None
    assert alone is not None
    for one, other in ((with_library.keys, alone.keys), (with_library.values, alone.values)):
        assert all(np.array_equal(x, y) and x.shape == SHAPE for x, y in zip(one, other, strict=True))


def test_a_prompt_is_read_by_the_base(llama: Path, tmp_path: Path) -> None:
    adapter = _saved(tmp_path / "prompt", llama, PromptTuningConfig(**LM))
    base = load_base_model(llama, task="text-generation")
    found = resolve(adapter, base.modules, library=PeftLibrary(base)).prefix
    assert found is not None
    assert [key.shape for key in found.keys] == [SHAPE, SHAPE]
    embeddings = torch.from_numpy(adapter.tensors["prompt_embeddings"].read())[None]
    with torch.no_grad():
        cache = base.module(inputs_embeds=embeddings, use_cache=True).past_key_values
    assert all(np.allclose(layer.keys[0], key, atol=1e-6) for layer, key in zip(cache.layers, found.keys, strict=True))
    ids = torch.arange(5)[None]
    (outputs,) = adapter_outputs(base, adapter, [{"input_ids": ids}])
    assert outputs["logits"].shape == (1, 5, LLAMA["vocab_size"])


def test_more_than_keys_and_values_is_found_out(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = _saved(tmp_path / "prompt", llama, PromptEncoderConfig(**LM, encoder_hidden_size=8))
    base = load_base_model(llama, task="text-generation")
    run = past._run
    monkeypatch.setattr(past, "_run", lambda *args: [(key, 2 * value) for key, value in run(*args)])
    with pytest.raises(MergeError, match="adapter 'prompt' does more than its keys and values: peft's own logits"):
        PeftLibrary(base).past(adapter)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        (
            {"num_layers": 3},
            (3, 96),
            (
                "adapter 'prefix': it was trained for 3 layers of 2 key-value heads of 8, base has 2 layers of 2 "
                "key-value heads of 8"
            ),
        ),
        (
            {"num_attention_heads": 4},
            (3, 64),
            (
                "adapter 'prefix': it was trained for 2 layers of 4 key-value heads of 4, base has 2 layers of 2 "
                "key-value heads of 8"
            ),
        ),
        (
            {"num_virtual_tokens": 125},
            (125, 64),
            "adapter 'prefix': it begins every text with 125 virtual tokens, and base has 128 positions",
        ),
    ],
)
def test_adapters_of_other_shapes(changes, shape, message, llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    folder = tmp_path / "prefix"
    _saved(folder, llama, PrefixTuningConfig(**LM))
    config = {**json.loads((folder / "adapter_config.json").read_text()), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": np.ones(shape, np.float32)}, folder / "adapter_model.safetensors")
    (adapter,) = read_adapters(folder)
    base = load_base_model(llama, task="text-generation")
    with pytest.raises(AdapterError) as caught:
        resolve(adapter, base.modules, library=PeftLibrary(base))
    assert str(caught.value) == f"{message}\nHint: give the base that the adapter was trained on"


def test_models_without_a_cache_of_their_own(llama: Path, tmp_path: Path) -> None:
    adapter = _saved(tmp_path / "prefix", llama, PrefixTuningConfig(**LM))
    base = load_base_model(llama, task="text-generation")
    plain = base_from_module(
        torch.nn.Linear(2, 2), name="plain", example_inputs={"x": torch.ones(1, 2)}, dynamic_axes={}
    )
    for other in (dataclasses.replace(base, task="feature-extraction"), plain):
        with pytest.raises(AdapterError) as caught:
            PeftLibrary(other).past(adapter)
        assert str(caught.value) == (
            "virtual tokens are held in the key-value cache of a decoder-only language model, and "
            f"{other.name} for {other.task} has none\nHint: train LoRA for this model"
        )
