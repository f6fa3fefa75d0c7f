"""Every key of peft 0.21's LoraConfig: used, harmless for inference, or refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from edgeadapt.errors import AdapterError

# Training, bookkeeping, or placement only: the saved tensors and the keys in _USED say everything about the forward.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",  # read into Adapter.base
        "corda_config",  # the initialization decides: see _INITIALIZATIONS
        "enable_lora",  # peft < 0.3, always null
        "eva_config",
        "fan_in_fan_out",  # often wrong in files; the base's module decides
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",  # only the name of an import
        "merge_weights",  # peft < 0.3
        "monteclora_config",  # samples in training only (peft: MontecloraLinearVariant.forward)
        "peft_type",
        "peft_version",
        "qalora_group_size",  # only read if use_qalora
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",  # changes the backward pass only (peft: VeloraLinearVariant.forward)
    }
)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _whole(value: Any) -> bool:
    return _number(value) and float(value).is_integer()


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _table(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(test, value.values())))


def _either(*tests: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or any(test(value) for test in tests)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _indices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_index, value))


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


_USED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_whole, "a whole number above 0"),
    "lora_alpha": (_number, "a number above 0"),
    "target_modules": (lambda value: _text(value) or _texts(value), "text or a list of text"),
    "exclude_modules": (_either(_text, _texts), "text, a list of text or null"),
    "modules_to_save": (_either(_texts), "a list of text or null"),
    "layers_to_transform": (_either(_index, _indices), "a whole number, a list of them or null"),
    "layers_pattern": (_either(_text, _texts), "text, a list of text or null"),
    "rank_pattern": (_table(_whole), "a table of whole numbers above 0"),
    "alpha_pattern": (_table(_number), "a table of numbers above 0"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "use_rslora": (_flag, "true or false"),
    "use_dora": (_flag, "true or false"),
    "lora_bias": (_flag, "true or false"),
    "ensure_weight_tying": (_flag, "true or false"),
}

_PLAIN = "train plain LoRA, or merge it with peft and use the merged model as a base"
_REFUSED: Mapping[str, tuple[str, str]] = {
    "alora_invocation_tokens": ("aLoRA: it acts only after its invocation tokens", "train it without them"),
    "arrow_config": ("Arrow: it routes each token among other adapters", "export those adapters one by one"),
    "kasa_config": ("KaSA: it was trained on a truncated base that was not saved", _PLAIN),
    "layer_replication": ("layer replication: it was trained on a taller model than the base", _PLAIN),
    "megatron_config": ("Megatron: its layers are split over devices", "save it gathered, without Megatron"),
    "target_parameters": ("LoRA on bare parameters (mixture-of-experts weights), not on modules", _PLAIN),
    "trainable_token_indices": (
        "trainable tokens: it changes single rows of the embedding",
        "train the embedding whole: modules_to_save=['embed_tokens']",
    ),
    "use_bdlora": ("BD-LoRA: its factors are blocks of a block-diagonal matrix", "expand them to plain LoRA"),
    "use_qalora": ("QA-LoRA: it averages groups of inputs and needs its GPTQ base", _PLAIN),
}

_CONVERT = (
    "save it again with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it a "
    "plain LoRA of twice the rank"
)
_INITIALIZATIONS: Mapping[str, tuple[str, str]] = {
    "pissa": ("PiSSA: it was trained on a base whose main singular parts were taken out", _CONVERT),
    "olora": ("OLoRA: it was trained on a base whose QR parts were taken out", _CONVERT),
    "corda": ("CorDA: it was trained on a base that was changed by data", _CONVERT),
    "lora_ga": ("LoRA-GA: it was trained on a base that was changed by gradients", _CONVERT),
    "loftq": ("LoftQ: it was trained on a quantized residual of the base that was not saved", _PLAIN),
}
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")  # the base stays as it was


def check_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about a LoraConfig as saved; its keys are all used, harmless or refused.

    Raises:
        AdapterError: a key has a wrong type or value, or makes the file mean a computation that edgeadapt does not do.
    """
    for key in sorted(config):
        _check_key(key, config[key], str(config.get("peft_version") or "an unknown version"))
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in config:
            raise AdapterError(f"{key} is missing", hint="copy the file that peft wrote")
    _check_initialization(config.get("init_lora_weights", True))
    _check_combination(config)
    _check_patterns(config)
    return _training_only(config)


def _check_key(key: str, value: Any, version: str) -> None:
    if key in _USED:
        test, form = _USED[key]
        if not test(value):
            raise AdapterError(f"{key} is {value!r}, not {form}", hint="copy the file that peft wrote")
    elif key in _REFUSED:
        if value not in (None, False, [], {}):
            reason, hint = _REFUSED[key]
            raise AdapterError(f"{key} is set: {reason}, which edgeadapt does not do", hint=hint)
    elif key not in _HARMLESS and value not in (None, False, [], {}, ""):
        raise AdapterError(
            f"unknown key {key!r} is set to {value!r} (saved by peft {version}): it may change what is computed",
            hint="update edgeadapt, or remove the key if it has no effect after training",
        )


def _check_initialization(value: Any) -> None:
    name = str(value).lower()
    family = next((family for family in _INITIALIZATIONS if name == family or name.startswith("pissa")), None)
    if isinstance(value, str) and family is not None:
        reason, hint = _INITIALIZATIONS["pissa" if name.startswith("pissa") else family]
        raise AdapterError(f"init_lora_weights is {value!r}: {reason}", hint=hint)
    if (name if isinstance(value, str) else value) not in _PLAIN_INITIALIZATIONS:
        raise AdapterError(
            f"init_lora_weights is {value!r}: edgeadapt does not know if that changed the base",
            hint="update edgeadapt, or set it to true if the base was left as it was",
        )


def _check_combination(config: Mapping[str, Any]) -> None:
    targets = config["target_modules"]
    if not targets or targets == "dummy-target-modules":
        raise AdapterError("target_modules is empty: the adapter changes no module", hint="train it with targets")
    if config.get("use_dora") and config.get("lora_bias"):
        raise AdapterError("use_dora and lora_bias together, which peft does not define", hint="train with one of them")


def _check_patterns(config: Mapping[str, Any]) -> None:
    """Refuse what is no regular expression, where peft reads one."""
    patterns: list[str] = list(config.get("modules_to_save") or ())
    for key in ("target_modules", "exclude_modules"):
        patterns += [config[key]] if isinstance(config.get(key), str) else []
    layers = config.get("layers_pattern") or []
    patterns += [layers] if isinstance(layers, str) else layers
    patterns += [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(
                f"{pattern!r} is no regular expression: {error}", hint="correct it in the file"
            ) from error


def _training_only(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{key} acts in training only: its saved state is not used"
        for key in ("velora_config", "monteclora_config")
        if config.get(key)
    )
