"""Every key of peft 0.21's virtual-token configs: used, harmless for inference, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgeadapt.errors import AdapterError

CACHES = ("PREFIX_TUNING", "CARTRIDGE")
"""Types whose file holds keys and values; that of the others holds embeddings."""
MULTITASK = "MULTITASK_PROMPT_TUNING"
TYPES = (*CACHES, "PROMPT_TUNING", "P_TUNING", MULTITASK, "CPT")

# How the tokens were initialized, encoded or trained: the saved tensor is what came out of it.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",  # read into Adapter.base
        "cpt_mask",
        "cpt_token_ids",  # only how many: num_virtual_tokens
        "cpt_tokens_type_mask",
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
        "inference_mode",
        "init_weights",
        "num_frozen_tokens",  # frozen and trained tokens lie in one tensor
        "opt_loss_decay_factor",
        "opt_projection_epsilon",  # CPT's projection has been applied
        "opt_projection_format_epsilon",
        "opt_weighted_loss_type",
        "peft_type",
        "peft_version",
        "prefix_projection",
        "prompt_tuning_init",
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task",
        "prompt_tuning_init_text",
        "revision",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _whole_or_null(value: Any) -> bool:
    return value is None or _whole(value)


_USED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "num_virtual_tokens": (_whole, "a whole number above 0"),
    "num_layers": (_whole_or_null, "a whole number above 0 or null"),
    "num_attention_heads": (_whole_or_null, "a whole number above 0 or null"),
    "token_dim": (_whole_or_null, "a whole number above 0 or null"),
    "num_ranks": (_whole, "a whole number above 0"),
    "num_tasks": (_whole, "a whole number above 0"),
    "num_transformer_submodules": (_whole_or_null, "a whole number above 0 or null"),
    "task_type": (lambda value: value is None or isinstance(value, str), "text or null"),
    "modules_to_save": (lambda value: value is None or isinstance(value, list), "a list of text or null"),
}
_COPY = "copy the file that peft wrote"


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config that means a computation that edgeadapt does not do, or that is damaged.

    Raises:
        AdapterError: naming the key and its value.
    """
    for key, value in config.items():
        _check_key(key, value, str(config.get("peft_version", "unknown")))
    kind = config["peft_type"]
    needed = ["num_virtual_tokens", *(("num_layers", "num_attention_heads", "token_dim") if kind in CACHES else ())]
    for key in [*needed, *(("num_tasks", "num_ranks") if kind == MULTITASK else ())]:
        if config.get(key) is None:
            raise AdapterError(f"{key} is missing", hint=_COPY)
    if kind in CACHES and config["token_dim"] % config["num_attention_heads"]:
        raise AdapterError(
            f"token_dim {config['token_dim']} is no multiple of num_attention_heads {config['num_attention_heads']}",
            hint=_COPY,
        )
    _check_model(config, kind)


def _check_key(key: str, value: Any, version: str) -> None:
    if key in _USED:
        test, form = _USED[key]
        if not test(value):
            raise AdapterError(f"{key} is {value!r}, not {form}", hint=_COPY)
    elif key not in _HARMLESS and value not in (None, False, [], {}, ""):
        raise AdapterError(
            f"unknown key {key!r} is set to {value!r} (saved by peft {version}): it may change what is computed",
            hint="update edgeadapt, or remove the key if it has no effect after training",
        )


def _check_model(config: Mapping[str, Any], kind: str) -> None:
    """Refuse what is no decoder-only language model: there is no cache that the tokens could begin."""
    if config.get("task_type") != "CAUSAL_LM" or config.get("num_transformer_submodules") not in (None, 1):
        submodules = config.get("num_transformer_submodules")
        raise AdapterError(
            f"{kind} for task_type {config.get('task_type')!r} with {submodules or 1} transformer submodules: virtual "
            "tokens are held in the key-value cache of a decoder-only language model, and only such a model has one",
            hint="train LoRA for this task; virtual tokens are for task_type CAUSAL_LM",
        )
    if config.get("modules_to_save"):
        raise AdapterError(
            f"modules_to_save is {config['modules_to_save']!r} beside virtual tokens, which edgeadapt does not do",
            hint="train without modules_to_save",
        )
