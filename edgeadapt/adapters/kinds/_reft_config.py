"""The settings of AdapterHub's ReFT: every key is used, or known to matter in training alone, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeadapt.adapters.adapter import Activation
from edgeadapt.adapters.kinds import _bottleneck_config
from edgeadapt.errors import AdapterError

_USED = frozenset(
    {
        *("architecture", "layers", "prefix_positions", "suffix_positions", "r", "orthogonality", "tied_weights"),
        *("subtract_projection", "non_linearity", "output_reft", "dtype"),
    }
)
_TRAINING = frozenset({"dropout", "init_weights_seed"})
_FLAGS = ("orthogonality", "tied_weights", "subtract_projection", "output_reft")
_DEFAULTS = {"tied_weights": False, "subtract_projection": True, "output_reft": True}
_AGAIN = "save the adapter again with save_adapter"
_NO_OR_DI = (
    "the library saves NoReFT and DiReFT alike, and loads both as NoReFT; so it is read as NoReFT here. If it was "
    'trained as DiReFT, write "subtract_projection": false into the "config" of adapter_config.json (the library '
    "itself needs add_adapter with a DiReftConfig before load_adapter)"
)

_WHOLE_TEXTS = (
    "it acts on the first positions of a text, as in the library's forward over a whole text; with a key-value cache "
    "the library takes each new token for the first one: compare with use_cache=False"
)


def check_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about an adapter's config.

    Raises:
        AdapterError: a key is unknown, or means a computation that edgeadapt does not do.
    """
    settings = config["config"]
    unknown = sorted(settings.keys() - _USED - _TRAINING)
    if unknown:
        raise AdapterError(
            f"{unknown[0]} is {settings[unknown[0]]!r}, a setting that edgeadapt does not know",
            hint="update edgeadapt; the setting may change what the adapter computes",
        )
    _check_values(settings)
    if settings.get("dtype") not in (None, "float32"):
        raise AdapterError(
            f"dtype is {settings['dtype']!r}: the library computes with it in that precision and on a base in it alone",
            hint="write null in its place: the adapter is then computed with in float32",
        )
    activation_of(config)
    unsaid = "subtract_projection" not in settings and not settings["orthogonality"]
    return (*((_NO_OR_DI,) if unsaid else ()), *((_WHOLE_TEXTS,) if _writes(config) else ()))


def _writes(config: Mapping[str, Any]) -> bool:
    """Tell whether the adapter was trained in a model that writes texts."""
    head = ((config.get("head") or {}).get("config") or {}).get("head_type")
    return head == "causal_lm" or str(config.get("model_class")).endswith(("ForCausalLM", "LMHeadModel"))


def _check_values(settings: Mapping[str, Any]) -> None:
    for key in _FLAGS:
        if type(settings.get(key, _DEFAULTS.get(key))) is not bool:
            raise AdapterError(f"{key} is {settings.get(key)!r}, not true or false", hint=_AGAIN)
    for key, least in (("r", 1), ("prefix_positions", 0), ("suffix_positions", 0)):
        value = settings.get(key)
        if type(value) is not int or value < least:
            raise AdapterError(f"{key} is {value!r}, not a whole number of at least {least}", hint=_AGAIN)
    if not settings.get("output_reft", True) or not (settings["prefix_positions"] or settings["suffix_positions"]):
        what = "output_reft is false" if not settings.get("output_reft", True) else "it is for no position"
        raise AdapterError(f"{what}: the adapter does nothing", hint="train it with prefix_positions=3")
    layers = settings.get("layers")
    listed = isinstance(layers, list) and layers and all(type(layer) is int for layer in layers)
    if layers != "all" and not listed:
        raise AdapterError(f"layers is {layers!r}, not 'all' or a list of layers", hint=_AGAIN)


def activation_of(config: Mapping[str, Any]) -> Activation:
    """Return the activation between the two products.

    Raises:
        AdapterError: the graphs do not have it.
    """
    return "linear" if config["config"].get("non_linearity") is None else _bottleneck_config.activation_of(config)


def ends_of(settings: Mapping[str, Any]) -> str:
    """Return where in a text the adapter acts: "first" for its first positions alone, "both" for its last ones too."""
    return "both" if settings["suffix_positions"] else "first"


def units_of(settings: Mapping[str, Any]) -> tuple[tuple[int, str], ...]:
    """Return the number of the unit that acts at each end of a text, for the ends that have positions."""
    tied = settings.get("tied_weights", False)
    ends = (("prefix", 0), ("suffix", 0 if tied else 1))
    return tuple((index, end) for end, index in ends if settings[f"{end}_positions"])
