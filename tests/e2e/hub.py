"""Adapters saved by the real library `adapters` (AdapterHub) on tiny random models, and its own forward."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch
import transformers
from adapters.composition import Average, Fuse, Stack

from tests.e2e.tiny import DECODER, ENCODER, IMAGE

Arrays = Mapping[str, np.ndarray]

_PREFIX = adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=16)
CONFIGS: Mapping[str, Any] = {
    "seq_bn": adapters.SeqBnConfig(reduction_factor=8),
    "seq_bn_wide": adapters.SeqBnConfig(reduction_factor={"0": 2, "default": 4}),
    "seq_bn_one_layer": adapters.SeqBnConfig(reduction_factor=8, leave_out=[0]),
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=8),
    "par_bn": adapters.ParBnConfig(reduction_factor=4),
    "scaled_par_bn": adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
    "compacter": adapters.CompacterConfig(reduction_factor=8),
    "compacterpp": adapters.CompacterPlusPlusConfig(reduction_factor=8, factorized_phm_rule=True),
    "own_rules": adapters.CompacterConfig(reduction_factor=8, shared_phm_rule=False, factorized_phm_W=False),
    # with stochastic depth the library asks for torchvision
    "adapterplus": adapters.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0),
    "normalized": adapters.SeqBnConfig(reduction_factor=8, ln_before=True, non_linearity="gelu_new"),
    "leaky": adapters.DoubleSeqBnConfig(reduction_factor=8, non_linearity="leakyrelu"),
    "seq_bn_inv": adapters.SeqBnInvConfig(reduction_factor=8),
    "double_seq_bn_inv": adapters.DoubleSeqBnInvConfig(reduction_factor=8, inv_adapter_reduction_factor=4),
    "lora": adapters.LoRAConfig(r=4, alpha=8),
    "lora_all": adapters.LoRAConfig(r=2, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True),
    "ia3": adapters.IA3Config(),
    "ia3_output": adapters.IA3Config(attn_matrices=["v"], intermediate_lora=False, output_lora=True, leave_out=[1]),
    "dora": adapters.DoRAConfig(r=4, alpha=6),
    "dora_q": adapters.DoRAConfig(r=2, attn_matrices=["q"]),
    "vera": adapters.VeraConfig(r=4),
    "vera_k": adapters.VeraConfig(r=2, attn_matrices=["k"], vera_d=0.5),
    "dvora": adapters.DvoRAConfig(r=4),
    "dvora_q": adapters.DvoRAConfig(r=2, attn_matrices=["q"]),
    "mtl_lora": adapters.MTLLoRAConfig(r=3, n_up_projection=2, alpha=6),
    "mtl_lora_one": adapters.MTLLoRAConfig(r=2, attn_matrices=["q", "k"], output_lora=True),
    "prefix": _PREFIX,
    "prefix_flat": adapters.PrefixTuningConfig(prefix_length=3, flat=True),
    "mam": adapters.MAMConfig(_PREFIX, adapters.ParBnConfig(reduction_factor=8)),
    "union": adapters.ConfigUnion(adapters.LoRAConfig(r=4, output_lora=True), adapters.SeqBnConfig(reduction_factor=8)),
    "union_of_bottlenecks": adapters.ConfigUnion(
        adapters.BnConfig(True, False, 8, "relu", leave_out=[1]), adapters.CompacterPlusPlusConfig(reduction_factor=8)
    ),
    "union_ia3": adapters.ConfigUnion(adapters.CompacterConfig(reduction_factor=8), adapters.IA3Config()),
    "loreft": adapters.LoReftConfig(r=2),
    "loreft_both": adapters.LoReftConfig(r=3, prefix_positions=2, suffix_positions=3),
    "loreft_tied": adapters.LoReftConfig(prefix_positions=5, suffix_positions=4, tied_weights=True),
    "noreft": adapters.NoReftConfig(r=2, prefix_positions=1, layers=[0]),
    "noreft_last": adapters.NoReftConfig(prefix_positions=0, suffix_positions=1),
    "noreft_tanh": adapters.NoReftConfig(r=4, non_linearity="tanh"),
    "direft": adapters.DiReftConfig(r=2, suffix_positions=2),
    "direft_first": adapters.DiReftConfig(prefix_positions=4, non_linearity="gelu"),
    "union_reft": adapters.ConfigUnion(
        adapters.LoRAConfig(r=4), adapters.SeqBnConfig(reduction_factor=8), adapters.LoReftConfig(suffix_positions=1)
    ),
    "union_reft_first": adapters.ConfigUnion(adapters.SeqBnConfig(reduction_factor=8), adapters.LoReftConfig(r=2)),
}
REFT_DECODERS = ("loreft", "noreft", "noreft_tanh", "direft_first", "union_reft_first")
"""Those that change the first positions alone."""
_BN, _WIDE, _INV = CONFIGS["seq_bn"], adapters.SeqBnConfig(reduction_factor=4), CONFIGS["seq_bn_inv"]
SETUPS: Mapping[str, tuple[Mapping[str, Any], Any]] = {
    "stack": ({"language": _INV, "task": _WIDE}, Stack("language", "task")),
    "stack_of_methods": (
        {"h": CONFIGS["double_seq_bn"], "p": CONFIGS["seq_bn_one_layer"], "l": CONFIGS["lora"]},
        Stack("h", "p", "l"),
    ),
    "stack_of_weights": ({"q": CONFIGS["dora_q"], "i": CONFIGS["ia3"]}, Stack("q", "i")),
    "fusion": ({"a": _BN, "b": _WIDE, "c": adapters.SeqBnConfig(reduction_factor=16)}, Fuse("a", "b", "c")),
    "fusion_static": ({"d": CONFIGS["double_seq_bn"], "e": CONFIGS["double_seq_bn"]}, Fuse("d", "e")),
    "fusion_plus": ({"x": CONFIGS["adapterplus"], "y": CONFIGS["adapterplus"]}, Fuse("x", "y")),
    "stack_of_fusion": ({"language": _INV, "a": _BN, "b": _WIDE}, Stack("language", Fuse("a", "b"))),
    "average": ({"l": CONFIGS["lora"], "m": CONFIGS["lora_all"]}, Average("l", "m", weights=[0.3, 0.7])),
}
"""Compositions: their adapters, and how they are put together."""
# safetensors refuses what shares memory
AS_PICKLE = {"fusion_static", "normalized", "double_seq_bn", "prefix", "prefix_flat", "mam"}


@dataclass(frozen=True)
class Family:
    """A tiny base, and the adapters that are tried on it."""

    model: Any
    config: Any
    adapters: tuple[str, ...]


_DISTILBERT = {"vocab_size": 128, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "num_labels": 3}
_GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
ENCODERS = (
    *(name for name in CONFIGS if name not in ("prefix", "prefix_flat", "mam", "direft_first", "union_reft_first")),
    *SETUPS,
)
_LLAMA = (
    *("seq_bn", "double_seq_bn", "par_bn", "adapterplus", "seq_bn_inv", "union"),
    *("lora", "lora_all", "ia3", "dora", "mtl_lora"),
)
FAMILIES = {
    "bert": Family(transformers.BertForSequenceClassification, transformers.BertConfig(**ENCODER), ENCODERS),
    # with heads below
    "roberta": Family(
        *(transformers.RobertaForSequenceClassification, transformers.RobertaConfig(**ENCODER)), ("lora", "loreft_both")
    ),
    "distilbert": Family(
        *(
            transformers.DistilBertForSequenceClassification,
            transformers.DistilBertConfig(max_position_embeddings=64, **_DISTILBERT),
        ),
        ("seq_bn", "par_bn", "seq_bn_inv", "lora_all", "dora", "mtl_lora", "loreft", "loreft_both", "direft"),
    ),
    "gpt2": Family(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(**_GPT2),
        ("seq_bn", "par_bn", "seq_bn_inv", "lora", "ia3", "union", *REFT_DECODERS),
    ),
    "llama": Family(
        *(transformers.LlamaForCausalLM, transformers.LlamaConfig(**DECODER)),
        (*_LLAMA, "prefix", "prefix_flat", "mam", "stack_of_methods", "stack_of_fusion", "average", *REFT_DECODERS),
    ),
    # which the library knows through a plugin interface
    "qwen2": Family(
        *(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**DECODER)),
        ("seq_bn", "par_bn", "seq_bn_inv", "lora", "stack_of_fusion", "loreft"),
    ),
    "vit": Family(
        *(transformers.ViTForImageClassification, transformers.ViTConfig(**IMAGE, num_labels=3)),
        ("adapterplus", "seq_bn", "lora", "loreft", "loreft_both", "noreft_last"),
    ),
}


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
                    change = 0.2 * torch.randn_like(parameter)
                    if key.endswith(".parametrizations.weight.original"):
                        change.fill_diagonal_(0)  # signs, which training leaves alone
                    parameter.add_(change)
        model.save_adapter(str(folder), name, use_safetensors=safe)
    if not getattr(config, "subtract_projection", True):
        file = folder / "adapter_config.json"
        saved = json.loads(file.read_text())
        saved["config"]["subtract_projection"] = False  # which the library leaves out
        file.write_text(json.dumps(saved))
    return folder


def save_setup(model: Any, name: str, folder: Path, *, seed: int = 1) -> Path:
    """Let the library save a composition on `model` with random values, each adapter with a copy of the head."""
    logging.getLogger("adapters").setLevel(logging.CRITICAL)
    parts, setup = SETUPS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters.init(model)
        for part, config in parts.items():
            model.add_adapter(part, config=config)
        for block in (setup, *setup.children):
            if isinstance(block, Fuse):
                model.add_adapter_fusion(block, "static" if "static" in name else "dynamic")
        torch.manual_seed(seed)
        names = tuple(f".{part}." for part in (*parts, *model.adapters_config.fusions))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if any(part in key for part in names) or _is_of_head(model, key):
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_adapter_setup(str(folder), setup, use_safetensors=name not in AS_PICKLE)
    return folder


def _is_of_head(model: Any, key: str) -> bool:
    return not key.startswith(f"{model.base_model_prefix}.") and not key.startswith("lm_head")


def forward(model: Any, folder: Path | None, inputs: Arrays, *, safe: bool = True) -> np.ndarray:
    """Return the logits of a fresh `model` with the adapter in `folder` that the library itself has loaded."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapters.init(model)
        if folder is not None and (folder / "adapter_setup.json").is_file():
            model.load_adapter_setup(str(folder), set_active=True, use_safetensors=safe)
        elif folder is not None:
            saved = json.loads((folder / "adapter_config.json").read_text())
            if not saved["config"].get("subtract_projection", True):  # else the library loads it as NoReFT
                model.add_adapter(saved["name"], config=adapters.DiReftConfig.from_dict(saved["config"]))
            name = model.load_adapter(str(folder), set_active=True, use_safetensors=safe)
            model.set_active_adapters(name)
        output = model.eval()(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    return np.asarray(output.logits)
