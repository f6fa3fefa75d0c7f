"""The resolved adapter computes what peft computes without merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from edgeadapt.adapters import read_adapters, resolve

from .tiny import attach, build, inputs_of, outputs, relative_error, save, target_modules

TOLERANCE = 1e-5  # float32 sums in another order; peft's own merged and unmerged forwards differ as much

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}),
    "all-linear": ("llama", {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "regex": ("llama", {"r": 2, "target_modules": r"model\.layers\.1\.self_attn\.(q|v)_proj"}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["v_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, "up_proj": 3},
            "alpha_pattern": {"^model.layers.0.mlp.up_proj": 7.5},
        },
    ),
    "layers": ("llama", {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "exclude": (
        "llama",
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    ),
    "dora": (
        "llama-bias",
        {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "o_proj", "gate_proj"]},
    ),
    "dora-rslora": (
        "llama",
        {"r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": True, "target_modules": ["q_proj"]},
    ),
    "embedding": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-dora": (
        "llama",
        {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["embed_tokens", "lm_head"]},
    ),
    "tied-both": ("llama-tied", {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head"]}),
    "tied-head": ("llama-tied", {"r": 3, "target_modules": ["lm_head"]}),
    "tied-ensured": ("llama-tied", {"r": 3, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied-saved": ("llama-tied", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied-saved-ensured": (
        "llama-tied",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved-norms-and-head": (
        "llama",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head", "embed_tokens"]},
    ),
    "lora-bias": (
        "bert-classifier",
        {"r": 3, "lora_alpha": 7, "lora_bias": True, "target_modules": ["query", "output.dense"]},
    ),
    "lora-bias-new": ("llama", {"r": 3, "lora_alpha": 7, "lora_bias": True, "target_modules": ["q_proj"]}),
    "bias-all": ("bert-classifier", {"r": 3, "bias": "all", "target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bias-all-tied": ("bert-mlm", {"r": 3, "bias": "all", "target_modules": ["query"]}),
    "bias-only": (
        "bert-classifier",
        {"r": 3, "bias": "lora_only", "lora_bias": True, "target_modules": ["key", "dense"]},
    ),
    "bias-dora": (
        "bert-classifier",
        {"r": 3, "bias": "all", "use_dora": True, "target_modules": ["query"], "task_type": "SEQ_CLS"},
    ),
    "head": ("bert-classifier", {"r": 3, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "head-and-its-namesake": ("distilbert", {"r": 3, "target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "embeddings-bert": ("bert-classifier", {"r": 3, "target_modules": ["word_embeddings", "token_type_embeddings"]}),
    "conv1d": ("gpt2", {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "wte"]}),
    "conv1d-dora": ("gpt2", {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["c_attn", "c_fc"]}),
    "conv1d-bias": ("gpt2", {"r": 4, "bias": "all", "lora_bias": True, "target_modules": ["c_attn"]}),
    "conv2d": (
        "conv",
        {"r": 4, "lora_alpha": 6, "target_modules": ["stem", "point"], "modules_to_save": ["classifier.1"]},
    ),
    "conv2d-dora": ("conv", {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["stem", "point"]}),
    "conv2d-bias": (
        "conv",
        {"r": 4, "bias": "all", "lora_bias": True, "target_modules": ["stem", "point", "classifier.1"]},
    ),
    "conv2d-groups": ("conv", {"r": 8, "lora_alpha": 6, "target_modules": ["grouped", "stem"]}),
    "scaled-embedding": ("tagger", {"r": 3, "lora_alpha": 6, "target_modules": ["embed", "head"]}),
    "scaled-embedding-dora": ("tagger", {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ["embed"]}),
    "mica": ("llama", {"r": 2, "init_lora_weights": "mica", "target_modules": ["q_proj"]}),
    "orthogonal": ("llama", {"r": 2, "init_lora_weights": "orthogonal", "target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_resolved_forward_is_pefts(case: str, tmp_path: Path) -> None:
    base, settings = CASES[case]
    folder = save(tmp_path / "adapter", base, **settings)
    inputs, model = inputs_of(base), build(base)
    plain = outputs(model, inputs)
    reference = outputs(PeftModel.from_pretrained(build(base), str(folder)).eval(), inputs)

    (adapter,) = read_adapters(folder)
    resolved = resolve(adapter, target_modules(model))
    measured = outputs(attach(model, resolved), inputs)

    assert relative_error(plain, reference) > 1e-3, "the adapter must act, or this test shows nothing"
    assert relative_error(measured, reference) < TOLERANCE
    for site in resolved.sites.values():
        assert all(term is None or term.dtype == np.float32 for term in (site.a, site.b, site.gain, site.offset))
