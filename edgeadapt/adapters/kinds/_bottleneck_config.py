"""The settings of AdapterHub's bottlenecks: every key is used, or known to matter in training alone, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeadapt.adapters.adapter import Activation, Reads
from edgeadapt.errors import AdapterError

_USED = frozenset(
    {
        *("architecture", "mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "leave_out"),
        *("original_ln_before", "original_ln_after", "residual_before_ln", "ln_before", "is_parallel", "scaling"),
        *("phm_layer", "phm_dim", "phm_rank", "phm_bias", "factorized_phm_W", "factorized_phm_rule"),
        *("shared_phm_rule", "shared_W_phm", "inv_adapter", "inv_adapter_reduction_factor", "invertible_adapter"),
    }
)
_TRAINING = frozenset(
    {
        *("init_weights", "init_weights_seed", "dropout", "stochastic_depth", "learn_phm", "phm_c_init"),
        *("phm_init_range", "hypercomplex_nonlinearity", "adapter_residual_before_ln"),
    }
)
_REFUSED = {
    "cross_adapter": "adapters after cross-attention, which are not read yet",
    "ln_after": "a norm of its own behind the bottleneck, which the graphs do not have yet",
    "use_gating": "gates that are averaged over the tokens (UniPELT), which the graphs do not have yet",
}
ACTIVATIONS: Mapping[str, Activation] = {
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
    "quick_gelu": "quick_gelu",
    "linear": "linear",
}
_OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What activations were called before the library wrote its version into the config."""
_NO_INVERSE = (
    "its invertible part acts behind the embeddings; the library puts its inverse only before the language modelling "
    "heads of AutoAdapterModel, and there is none here"
)
_AGAIN = "save the adapter again with save_adapter"


def block_of(settings: Mapping[str, Any]) -> str | None:
    """Return the block type of the invertible adapter that settings name, None for none."""
    older = settings.get("invertible_adapter")
    found = settings.get("inv_adapter") or (older.get("block_type") if isinstance(older, Mapping) else older)
    return str(found) if found else None


def is_bottleneck(config: Mapping[str, Any]) -> bool:
    """Tell whether `config` is of a bottleneck adapter: it names no other method."""
    return config["config"].get("architecture") is None and "non_linearity" in config["config"]


def check_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about an adapter's config.

    Raises:
        AdapterError: a key is unknown, or means a computation that edgeadapt does not do.
    """
    settings = config["config"]
    for key, what in _REFUSED.items():
        if settings.get(key):
            raise AdapterError(
                f"{key} is {settings[key]!r}: {what}", hint="train the adapter without it, or watch the changelog"
            )
    unknown = sorted(settings.keys() - _USED - _TRAINING - _REFUSED.keys())
    if unknown:
        raise AdapterError(
            f"{unknown[0]} is {settings[unknown[0]]!r}, a setting that edgeadapt does not know",
            hint="update edgeadapt; the setting may change what the adapter computes",
        )
    _check_values(config, settings)
    activation_of(config)
    reads_of(settings, normed=True)
    return _check_inverse(config) if block_of(settings) else ()


def _check_inverse(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what is to be known of an invertible part's inverse, which the library runs in some models alone."""
    if "interface" in config:
        return ()
    head = ((config.get("head") or {}).get("config") or {}).get("head_type")
    if head in ("causal_lm", "masked_lm"):
        raise AdapterError(
            f"it has an invertible part and a head of type {head!r} by name, before which the library puts the inverse",
            hint="save it with with_head=False, for tasks that are not language modelling",
        )
    return (_NO_INVERSE,)


def _check_values(config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if block_of(settings) not in (None, "nice"):
        raise AdapterError(
            f"the invertible adapter is of the block type {block_of(settings)!r}, which the library itself cannot run",
            hint="train with inv_adapter='nice'",
        )
    if not settings.get("mh_adapter") and not settings.get("output_adapter"):
        raise AdapterError("mh_adapter and output_adapter are both false: the adapter has no place", hint=_AGAIN)
    scaling = settings.get("scaling", 1.0)
    known = scaling in ("learned", "channel") if isinstance(scaling, str) else _is_number(scaling)
    if not known:
        raise AdapterError(f"scaling is {scaling!r}, not a number, 'learned' or 'channel'", hint=_AGAIN)
    size = config.get("hidden_size", 0)
    if size is not None and (type(size) is not int or size < 1):
        raise AdapterError(f"hidden_size is {size!r}, not the base's width", hint=_AGAIN)
    leave_out = settings.get("leave_out") or []
    if not isinstance(leave_out, list) or not all(type(layer) is int for layer in leave_out):
        raise AdapterError(f"leave_out is {leave_out!r}, not a list of layers", hint=_AGAIN)
    factors = settings.get("reduction_factor")
    for factor in factors.values() if isinstance(factors, Mapping) else [factors]:
        if factor is None or not _is_number(factor) or factor <= 0:
            raise AdapterError(
                f"reduction_factor is {factors!r}, not a number above 0, or a table of them", hint=_AGAIN
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def activation_of(config: Mapping[str, Any]) -> Activation:
    """Return the bottleneck's activation.

    Raises:
        AdapterError: the graphs do not have it.
    """
    given = config["config"].get("non_linearity")
    name = str(given) if "version" in config else _OLD_NAMES.get(str(given), str(given))
    if name.lower() not in ACTIVATIONS:
        raise AdapterError(
            f"non_linearity is {given!r}, which is not supported", hint=f"known activations: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name.lower()]


def width_of(config: Mapping[str, Any], layer: int, features: int = 1) -> int | None:
    """Return a bottleneck's width in layer number `layer`, None where reduction_factor does not name the layer.

    `features` stands for a model's width where it has several (CLIP), of which the config says none.
    """
    factor = config["config"]["reduction_factor"]
    if isinstance(factor, Mapping):
        factor = factor.get(str(layer), factor.get("default"))
    return None if factor is None else max(1, int((config["hidden_size"] or features) // factor))


def reads_of(settings: Mapping[str, Any], *, normed: bool) -> tuple[Reads, bool]:
    """Return what a bottleneck reads, and whether what it gives is added behind the layer's norm instead of before.

    Args:
        settings: the adapter's.
        normed: whether the layer normalizes the sum of its output and the residual (BERT), or passes it on (GPT-2).

    Raises:
        AdapterError: the base's own residual would be lost or added twice, or the library itself fails.
    """
    before, after = bool(settings.get("original_ln_before")), bool(settings.get("original_ln_after", True))
    residual = settings.get("residual_before_ln", True)
    if settings.get("is_parallel"):
        if after:
            return "residual", False
    elif after and not before and residual in (True, False):
        return "output", False
    elif after and before and residual is True:
        return ("norm" if normed else "sum"), False
    elif before and not after and residual is False:
        return ("output", True) if normed else ("sum", False)
    raise AdapterError(
        f"original_ln_before is {before}, original_ln_after {after}, residual_before_ln {residual!r} and is_parallel "
        f"{bool(settings.get('is_parallel'))}: together they lose the base's own residual, or add it twice",
        hint="only combinations that leave the base's residual in place are supported",
    )
