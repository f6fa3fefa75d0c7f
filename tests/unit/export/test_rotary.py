from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from edgeadapt.errors import ExportError
from edgeadapt.export.rotary import rotary_partners
from edgeadapt.merging.load import base_from_module

SMALL = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def _wrapped(model):
    inputs = {"input_ids": torch.zeros(1, 2).long()}
    return base_from_module(model, name="tiny", example_inputs=inputs, dynamic_axes={})


def _base(name: str, **values):
    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**{**SMALL, **values})
    return _wrapped(getattr(transformers, f"{name}ForCausalLM")(config))


def _pairs(size: int, pairs, dim: int = 16) -> np.ndarray:
    wanted = np.eye(dim, dtype=bool)
    for one, other in pairs(size):
        wanted[one, other] = wanted[other, one] = True
    return wanted


def _halves(size: int):
    return [(i, i + size // 2) for i in range(size // 2)]


def _neighbours(size: int):
    return [(i, i + 1) for i in range(0, size, 2)]


@pytest.mark.parametrize(
    ("name", "values", "pairs", "size"),
    [
        ("Llama", {}, _halves, 16),
        ("Gemma3", {"head_dim": 16}, _halves, 16),  # two embeddings of other frequencies
        ("Phi", {"partial_rotary_factor": 0.5}, _halves, 8),  # the model hands over only the channels that turn
        ("GPTNeoX", {"rotary_pct": 0.25}, _halves, 4),  # the function leaves the others alone
        ("Cohere", {}, _neighbours, 16),
    ],
)
def test_partners_as_the_model_s_own_code_mixes_them(name, values, pairs, size):
    np.testing.assert_array_equal(rotary_partners(_base(name, **values), 16), _pairs(size, pairs))


def test_learned_positions_mix_nothing():
    config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    base = _wrapped(transformers.GPT2LMHeadModel(config))
    np.testing.assert_array_equal(rotary_partners(base, 16), np.eye(16, dtype=bool))


def test_a_rotary_embedding_of_another_form_is_refused(monkeypatch):
    base = _base("Llama")
    monkeypatch.delattr(modeling_llama, "apply_rotary_pos_emb")
    with pytest.raises(ExportError) as caught:
        rotary_partners(base, 16)
    assert str(caught.value) == (
        "which channels the rotary embedding of LlamaForCausalLM mixes cannot be found out: it has no function "
        "apply_rotary_pos_emb\nHint: leave out --kv-cache; a key's range at later positions is not known"
    )
