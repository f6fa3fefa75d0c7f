"""Adapters of AdapterHub that change weights, read off the library's own forward on the float base.

LoRA, DoRA, IA3, VeRA and DVoRA are one config ("architecture": "lora") with other settings. MTL-LoRA has its own, and
is saved as an adapter for each task, with what the tasks share in each of them. They are not what peft means by these
names: DoRA's norm leaves out the scaling, DoRA and IA3 scale the bias too, and VeRA's scalings are full matrices. So no
formula is written down here; the export proves that each module's forward is a product. Semantics of adapters 1.3:
`methods/lora.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeadapt.adapters.adapter import Adapter, Library, ResolvedAdapter, TargetModule
from edgeadapt.adapters.from_library import resolve_from_library
from edgeadapt.adapters.hub_heads import resolve_head
from edgeadapt.adapters.hub_keys import check_method, head_tensors
from edgeadapt.errors import AdapterError

KINDS: Mapping[str, str] = {
    "adapterhub_dora": "DoRA as AdapterHub saves it: a low-rank term, and a gain per output",
    "adapterhub_dvora": "DVoRA as AdapterHub saves it: VeRA with a gain per output",
    "adapterhub_ia3": "IA3 as AdapterHub saves it: a gain per output",
    "adapterhub_lora": "LoRA as AdapterHub saves it",
    "adapterhub_mtl_lora": "MTL-LoRA as AdapterHub saves it: a task's mix of low-rank terms",
    "adapterhub_vera": "VeRA as AdapterHub saves it: random projections that layers share, scaled",
}
TERMS: frozenset[str] = frozenset()
_COSTS = {
    "adapterhub_dora": "a low-rank term and a gain per output beside each module",
    "adapterhub_dvora": "a low-rank term and a gain per output beside each module",
    "adapterhub_ia3": "a gain per output",
    "adapterhub_lora": "a low-rank term beside each module",
    "adapterhub_mtl_lora": "a low-rank term beside each module",
    "adapterhub_vera": "a low-rank term beside each module",
}
_USED = frozenset(
    {
        *("architecture", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out", "r", "alpha"),
        *("attn_matrices", "composition_mode", "use_gating", "use_dora", "vera_d", "vera_b"),
    }
)
_MTL = frozenset({"n_up_projection", "task_specific_matrix_type", "weights_sharpness"})
_TRAINING = frozenset({"dropout", "init_weights", "init_weights_seed", "dtype"})
_METHODS: Mapping[str, tuple[str, str, str]] = {
    "prompt_tuning": (
        "prompt tuning",
        "its prompt lengthens the text of encoders, the only models that the library has it for",
        "train prompt tuning of a decoder with peft, or another adapter",
    ),
}
REFUSED: Mapping[str, tuple[str, str]] = {
    f"{title} (AdapterHub)": (reason, hint) for title, reason, hint in _METHODS.values()
} | {
    "UniPELT (AdapterHub)": (
        (
            "its gates are averages over all tokens of the input, padding too, and a key-value cache is filled before "
            "they are known"
        ),
        "train its parts without gates: a union of them is read",
    )
}
"""Methods of AdapterHub that are refused by name: the reason, and what to do instead."""
_OF_WEIGHTS = ("lora", "mtl_lora")
_MODES = ("add", "scale")
_AGAIN = "save the adapter again with save_adapter"


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of one of these kinds, or of one that is refused."""
    method = config["config"].get("architecture") if layout == "adapterhub" else None
    return isinstance(method, str) and (method in _OF_WEIGHTS or method in _METHODS)


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the kind's name."""
    settings = config["config"]
    if settings["architecture"] == "mtl_lora":
        return "adapterhub_mtl_lora"
    if settings.get("composition_mode") == "scale":
        return "adapterhub_ia3"
    vera = any(isinstance(settings.get(key), float) for key in ("vera_d", "vera_b"))
    if settings.get("use_dora"):
        return "adapterhub_dvora" if vera else "adapterhub_dora"
    return "adapterhub_vera" if vera else "adapterhub_lora"


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`.

    Raises:
        AdapterError: the method is refused, or a key is unknown, or means a computation that edgeadapt does not do.
    """
    settings = config["config"]
    if (method := settings.get("architecture")) in _METHODS:
        _, reason, hint = _METHODS[method]
        raise AdapterError(f"architecture {method!r} is not supported: {reason}", hint=hint)
    if settings.get("use_gating"):
        raise AdapterError(
            "use_gating is true: the gate is an average over all tokens of the input, so the change is no weight",
            hint="train the adapter without gates (UniPELT sets them in all of its parts)",
        )
    mtl = method == "mtl_lora"
    if mtl and settings.get("task_specific_matrix_type", "singular_values") != "singular_values":
        raise AdapterError(
            f"task_specific_matrix_type is {settings['task_specific_matrix_type']!r}, which the library itself cannot "
            "run",
            hint="train with task_specific_matrix_type='singular_values'",
        )
    unknown = sorted(settings.keys() - _USED - _TRAINING - (_MTL if mtl else frozenset()))
    if unknown:
        raise AdapterError(
            f"{unknown[0]} is {settings[unknown[0]]!r}, a setting that edgeadapt does not know",
            hint="update edgeadapt; the setting may change what the adapter computes",
        )
    mode, rank = settings.get("composition_mode", "add"), settings.get("r")
    if mode not in _MODES:
        raise AdapterError(f"composition_mode is {mode!r}, not one of {', '.join(_MODES)}", hint=_AGAIN)
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"r is {rank!r}, not a rank", hint=_AGAIN)
    return ()


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors, as far as they can be judged without the base.

    Raises:
        AdapterError: there are none, or one is of another method, empty or of integers.
    """
    check_method(adapter, ("loras", "shared_parameters"))
    return ()


def resolve(
    adapter: Adapter, modules: Mapping[str, TargetModule], base_name: str | None, library: Library | None
) -> ResolvedAdapter:
    """Return the adapter as the cheapest updates that give what the library's own forward computes.

    Raises:
        AdapterError: there is no library, the base is another one, a value is not finite, or nothing changes.
    """
    head = resolve_head(adapter, head_tensors(adapter), modules, base_name)
    return resolve_from_library(adapter, modules, base_name, library, replaced=head)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    settings = adapter.config["config"]
    places = {
        "attention": settings.get("selfattn_lora"),
        "intermediate": settings.get("intermediate_lora"),
        "output": settings.get("output_lora"),
    }
    return {
        "variant": KINDS[adapter.kind],
        "rank": settings.get("r"),
        "places": [place for place, there in places.items() if there],
        "attention_matrices": settings.get("attn_matrices"),
        "modules_to_save": sorted({key.rpartition(".")[0] for key in head_tensors(adapter)}),
        "merge": {"exact": True, "reason": "each module's forward is a product, which folds into its weight and bias"},
        "swap": {"possible": True, "reason": _COSTS[adapter.kind]},
        "needs_base_weights": True,
    }
