"""Prefix tuning as AdapterHub saves it: keys and values before those of every layer of a decoder.

The library puts them in after the rotation of keys, and texts begin at position 0 all the same; a session's text begins
behind the prefix. So its keys are rotated as far as the text moves, which leaves every product with a query as it was:
`merging/hub_past.py` does it on the float base, and proves it. Semantics of adapters 1.3: `methods/prefix_tuning.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeadapt.adapters.adapter import Adapter, Library, Prefix, ResolvedAdapter, TargetModule
from edgeadapt.adapters.fingerprint import check_digest
from edgeadapt.adapters.hub_heads import resolve_head
from edgeadapt.adapters.hub_keys import check_method, head_tensors
from edgeadapt.errors import AdapterError

KINDS: Mapping[str, str] = {"adapterhub_prefix": "prefix tuning as AdapterHub saves it, in decoders"}
TERMS: frozenset[str] = frozenset()
_USED = frozenset({"architecture", "leave_out", "flat", "prefix_length", "bottleneck_size", "non_linearity"})
_TRAINING = frozenset({"dropout", "init_weights_seed", "shared_gating", "encoder_prefix", "cross_prefix"})
_EAGER = (
    "it is used as the library computes it with attn_implementation='eager'; with 'sdpa' (often the default) the "
    "library hides prefixes from padded texts and shows parts of them to others: train and compare with 'eager'"
)
_AGAIN = "save the adapter again with save_adapter"


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "adapterhub" and config["config"].get("architecture") == "prefix_tuning"


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the kind's name."""
    del config
    return "adapterhub_prefix"


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`.

    Raises:
        AdapterError: a key is unknown, or means a computation that edgeadapt does not do.
    """
    settings = config["config"]
    if settings.get("use_gating"):
        raise AdapterError(
            "use_gating is true: keys and values would be scaled by an average over all tokens of the input, and a "
            "key-value cache is filled before they are known",
            hint="train the adapter without gates (UniPELT sets them in all of its parts)",
        )
    if settings.get("leave_out"):
        raise AdapterError(
            f"leave_out is {settings['leave_out']!r}: some layers have a prefix and some have none, and a key-value "
            "cache is equally long in all",
            hint="train the prefix in all layers",
        )
    unknown = sorted(settings.keys() - _USED - _TRAINING - {"use_gating"})
    if unknown:
        raise AdapterError(
            f"{unknown[0]} is {settings[unknown[0]]!r}, a setting that edgeadapt does not know",
            hint="update edgeadapt; the setting may change what the adapter computes",
        )
    length = settings.get("prefix_length")
    if type(length) is not int or length < 1:
        raise AdapterError(f"prefix_length is {length!r}, not a number of tokens", hint=_AGAIN)
    return (_EAGER,)


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors, as far as they can be judged without the base.

    Raises:
        AdapterError: there are none, or one is of another method, empty or of integers.
    """
    check_method(adapter, ("prefix_tunings",))
    return ()


def resolve(
    adapter: Adapter, modules: Mapping[str, TargetModule], base_name: str | None, library: Library | None
) -> ResolvedAdapter:
    """Return the adapter as keys and values.

    Raises:
        AdapterError: there is no library, the base is another one, or a value is not finite.
    """
    if library is None:
        raise AdapterError(
            "AdapterHub's prefix tuning can only be read together with the float base, which a bundle does not hold",
            hint="pass the base with --base, or export the bundle again together with this adapter",
        )
    for path, module in modules.items():
        check_digest(adapter.base, (path,), module, base_name)
    for tensor in adapter.tensors.values():
        tensor.read()  # refuses what is not finite
    layers = library.past(adapter)
    prefix = Prefix(tuple(key for key, _ in layers), tuple(value for _, value in layers))
    head = resolve_head(adapter, head_tensors(adapter), modules, base_name)
    return ResolvedAdapter(adapter.name, adapter.kind, {}, head, prefix)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    return {
        "variant": KINDS[adapter.kind],
        "virtual_tokens": adapter.config["config"]["prefix_length"],
        "modules_to_save": sorted({key.rpartition(".")[0] for key in head_tensors(adapter)}),
        "merge": {"exact": False, "reason": "no weight changes: the text begins with virtual tokens"},
        "swap": {"possible": True, "reason": "keys and values of its tokens"},
        "needs_base_weights": True,
    }
