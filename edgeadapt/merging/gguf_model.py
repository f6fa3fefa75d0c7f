"""A GGUF file as a torch model in float32, read and mapped here: every tensor and every setting is used or refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeadapt.errors import BaseModelError
from edgeadapt.merging.assets import config_asset, saved_tokenizer
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.checkpoint import load_model
from edgeadapt.merging.gguf_file import Weights, read_gguf
from edgeadapt.merging.gguf_tokenizer import build_tokenizer
from edgeadapt.merging.modules import target_modules
from edgeadapt.merging.tasks import model_class

_NAMES_SHOWN = 5

# Settings by their name behind the architecture's, and the config entry that each one is.
_SETTINGS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_GPT2_SETTINGS = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
}
# Settings that must have this value if they are there; anything else is another computation.
_FIXED: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "rope.dimension_count": lambda value, config: value == _head_dim(config),
    "attention.value_length": lambda value, config: value == _head_dim(config),
    "rope.scaling.type": lambda value, _: value == "none",
    "expert_count": lambda value, _: value == 0,
    "expert_used_count": lambda value, _: value == 0,
}
_LLAMA_LIKE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_ARCHITECTURES = {
    "llama": (_LLAMA_LIKE, "model.layers", "LlamaForCausalLM"),
    "qwen2": (_LLAMA_LIKE, "model.layers", "Qwen2ForCausalLM"),
    "qwen3": (_LLAMA_LIKE, "model.layers", "Qwen3ForCausalLM"),
    "gpt2": (_GPT2, "transformer.h", "GPT2LMHeadModel"),
}
_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(path: Path, *, task: str | None = None, num_labels: int | None = None) -> BaseModel:
    """Return the decoder in a GGUF file, dequantized to float32, with its tokenizer repaired.

    Raises:
        BaseModelError: if the file is missing, damaged, or of an architecture, a tokenizer or settings that are not
            known here.
    """
    where = str(path)
    if task not in {None, "text-generation"} or num_labels is not None:
        asked = f"the task {task!r}" if task not in {None, "text-generation"} else f"{num_labels} labels"
        raise BaseModelError(
            f"{where}: {asked} cannot be had of a GGUF file, which holds a text generator",
            hint="leave it out, or give the Hugging Face folder of the model",
        )
    file = read_gguf(path)
    metadata, tensors = file.metadata, file.tensors
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise BaseModelError(
            f"{where} is of the architecture {architecture!r}, which is not read from GGUF",
            hint=f"known: {', '.join(sorted(_ARCHITECTURES))}; give the Hugging Face folder of this model",
        )
    config = _config(architecture, metadata, tensors, where)
    task, cls = model_class(config, "text-generation", where)
    checkpoint = load_model(cls, config, task, where, state=_state(architecture, config, tensors, where))
    module: Any = checkpoint.module
    module.generation_config = _generation_config(metadata)
    tokenizer = build_tokenizer(
        {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        | {"context_length": metadata[f"{architecture}.context_length"]},
        where,
    )
    return BaseModel(
        module=module,
        name=path.stem,
        revision=None,
        task=task,
        model_type=config.model_type,
        modules=target_modules(module),
        assets={
            "config.json": config_asset(config),
            "generation_config.json": _generation_asset(module.generation_config),
            **saved_tokenizer(tokenizer),
        },
    )


def _config(architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Weights], where: str) -> Any:
    from transformers import AutoConfig

    prefix = f"{architecture}."
    settings = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    entries = {_SETTINGS[key]: value for key, value in settings.items() if key in _SETTINGS}
    entries.setdefault("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))
    needed = ("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for key, entry in _SETTINGS.items():
        if entry in needed and entry not in entries:
            raise BaseModelError(f"{where}: {prefix}{key} is missing", hint="the file is incomplete; download it again")
    for key, value in settings.items():
        if key not in _SETTINGS and not (key in _FIXED and _FIXED[key](value, entries)):
            raise BaseModelError(
                f"{where}: the setting {prefix}{key} = {value!r} is not known here",
                hint="it may change what the model computes; give the Hugging Face folder of this model",
            )
    if architecture == "gpt2":
        entries = {_GPT2_SETTINGS.get(key, key): value for key, value in entries.items()}
    if architecture == "llama":
        entries |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    if _ROPE_FACTORS in tensors:
        entries["rope_scaling"] = _llama3_scaling(tensors[_ROPE_FACTORS], entries, where)
    tokens = {
        f"{name}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    return AutoConfig.for_model(
        architecture,
        architectures=[_ARCHITECTURES[architecture][2]],
        tie_word_embeddings="output.weight" not in tensors,
        **entries,
        **tokens,
    )


def _state(architecture: str, config: Any, tensors: Mapping[str, Weights], where: str) -> dict[str, torch.Tensor]:
    """Return the model's state; every tensor of the file has a place in it."""
    names, layers, _ = _ARCHITECTURES[architecture]
    state, unknown = {}, []
    for name, values in tensors.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        module = names.get(match[2]) if match else None
        if match is None or module is None:
            if name != _ROPE_FACTORS:
                unknown.append(name)
            continue
        path = module if match[1] is None else f"{layers}.{match[1]}.{module}"
        if architecture == "llama" and match[2] in {"attn_q", "attn_k"}:
            heads = config.num_attention_heads if match[2] == "attn_q" else config.num_key_value_heads
            values = _halves_of_heads(values, heads)  # noqa: PLW2901
        elif architecture == "gpt2" and values.ndim == 2 and match[1] is not None:
            values = values.T  # noqa: PLW2901 - Conv1D holds [in, out]
        state[f"{path}.{match[3]}"] = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
    if unknown:
        more = f" and {len(unknown) - _NAMES_SHOWN} more" if len(unknown) > _NAMES_SHOWN else ""
        raise BaseModelError(
            f"{where} holds tensors that have no place in a {architecture} model: "
            f"{', '.join(unknown[:_NAMES_SHOWN])}{more}",
            hint="give the Hugging Face folder of this model",
        )
    if "output.weight" not in tensors:
        embedding = names["token_embd"]
        state["lm_head.weight"] = state[f"{embedding}.weight"]
    return state


def _halves_of_heads(values: Weights, heads: int) -> Weights:
    """Return q or k rows in the Hugging Face order: GGUF interleaves the two halves that rotary position pairs up."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _llama3_scaling(factors: Weights, entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the rope_scaling entry whose factors these are.

    Raises:
        BaseModelError: if Llama 3's rule (factor from the file, frequency factors 1 and 4, original length 8192) gives
            other ones.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = LlamaConfig(**entries)
    scaled = LlamaConfig(**entries, rope_scaling=scaling)
    before, _ = ROPE_INIT_FUNCTIONS["default"](plain, torch.device("cpu"))
    after, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    if factors.shape != tuple(before.shape) or not np.allclose((before / after).numpy(), factors, rtol=1e-4):
        raise BaseModelError(
            f"{where}: the rotary factors in {_ROPE_FACTORS} are not Llama 3's",
            hint="give the Hugging Face folder of this model",
        )
    return scaling


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))


def _generation_config(metadata: Mapping[str, Any]) -> Any:
    """Return when to stop: at the end of text, and at the end of a turn if that is another token."""
    from transformers import GenerationConfig

    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom", "padding")}
    stops = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if ids[key] is not None))
    return GenerationConfig(
        bos_token_id=ids["bos"],
        eos_token_id=stops[0] if len(stops) == 1 else (stops or None),
        pad_token_id=ids["padding"],
    )


def _generation_asset(config: Any) -> bytes:
    from edgeadapt.files import canonical_json

    entries = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    return canonical_json({key: value for key, value in entries.items() if not key.startswith("_")})
