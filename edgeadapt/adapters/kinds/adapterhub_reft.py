"""ReFT as AdapterHub saves it: LoReFT, NoReFT and DiReFT change a layer's output at a text's first and last positions.

h' = h + R^T (f(W h + b) - R h), R with orthogonal rows in LoReFT; DiReFT leaves out R h. It is a branch beside the last
module of a layer. Semantics of adapters 1.3: `methods/reft.py`, and torch's `orthogonal` for R.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, Branch, Library, ResolvedAdapter, TargetModule
from edgeadapt.adapters.fingerprint import check_digest, check_unrounded
from edgeadapt.adapters.hub_heads import resolve_head
from edgeadapt.adapters.hub_keys import head_tensors
from edgeadapt.adapters.kinds._reft_config import activation_of, check_config, ends_of, units_of
from edgeadapt.adapters.kinds._reft_tensors import Unit, check_units, layers_of, source_of, tail_of
from edgeadapt.adapters.selection import find_move

KINDS: Mapping[str, str] = {
    "adapterhub_reft": "LoReFT, NoReFT and DiReFT as AdapterHub saves them: layers' outputs changed at some positions"
}
TERMS: frozenset[str] = frozenset()
_EVERYWHERE = np.float32(2.0**31)
"""More positions than a text has."""


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "adapterhub" and config["config"].get("architecture") == "reft"


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the kind's name."""
    del config
    return "adapterhub_reft"


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`.

    Raises:
        AdapterError: a key is unknown, or means a computation that edgeadapt does not do.
    """
    return check_config(config)


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors, as far as they can be judged without the base: none.

    Raises:
        AdapterError: a tensor is missing, empty, unknown or of a wrong kind.
    """
    check_units(adapter)
    return ()


def resolve(
    adapter: Adapter,
    modules: Mapping[str, TargetModule],
    base_name: str | None = None,
    library: Library | None = None,  # noqa: ARG001 - the files say everything
) -> ResolvedAdapter:
    """Return the adapter as arrays, proven complete against the base's `modules`.

    Raises:
        AdapterError: a layer has no tensors, a tensor has no use, or the base does not fit.
    """
    layers = layers_of(adapter)
    tail = tail_of(adapter, modules, base_name)
    move = find_move([f"{layer}.{tail.module}" for layer in layers], modules)
    branches = []
    for layer, units in sorted(layers.items()):
        path = f"{layer}.{tail.module}"
        module = modules[move.to_base(path)]
        check_digest(adapter.base, (path, module.path), module, base_name)
        branches.append(_branch(adapter, units, module, tail.reads))
    check_unrounded(adapter.base, {path: move.to_adapter(path) or path for path in modules}, modules, base_name)
    head = resolve_head(adapter, head_tensors(adapter), modules, base_name)
    return ResolvedAdapter(adapter.name, adapter.kind, {}, head, branches=tuple(branches))


def _branch(adapter: Adapter, units: Mapping[int, Unit], module: TargetModule, reads: str) -> Branch:
    """Return what an adapter does at one layer: its units side by side, each for positions of its own."""
    settings = adapter.config["config"]
    activation, ends = activation_of(adapter.config), ends_of(settings)
    first, last = (np.float32(settings[f"{end}_positions"]) for end in ("prefix", "suffix"))
    reach = {"prefix": (first, last, _EVERYWHERE), "suffix": (_EVERYWHERE, np.float32(0), last)}
    parts: dict[str, list[Array]] = {}
    for index, end in units_of(settings):
        source, bias, projection = source_of(adapter, units[index], module)
        subtracted = projection if settings.get("subtract_projection", True) else np.zeros_like(projection)
        linear = activation == "linear"
        columns = {"source": (source - subtracted if linear else source).T, "bias": bias}
        columns |= {} if linear else {"subtracted": subtracted.T}
        names = ("first", "rest", "last") if ends == "both" else ("first",)
        columns |= {name: np.full(len(bias), value) for name, value in zip(names, reach[end], strict=False)}
        for name, value in columns.items():
            parts.setdefault(name, []).append(value)
        parts.setdefault("up", []).append(projection)
    tensors = {
        name: np.ascontiguousarray(np.concatenate(values, axis=0 if name == "up" else -1), np.float32)
        for name, values in parts.items()
    }
    return Branch(module.path, "positions", {"reads": reads, "activation": activation, "ends": ends}, tensors)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    settings = adapter.config["config"]
    return {
        "variant": KINDS[adapter.kind],
        "rank": settings["r"],
        "layers": sorted({int(layer.rpartition(".")[2]) for layer in layers_of(adapter)}),
        "positions": {"first": settings["prefix_positions"], "last": settings["suffix_positions"]},
        "orthogonal": settings["orthogonality"],
        "subtract_projection": settings.get("subtract_projection", True),
        "modules_to_save": sorted({key.rpartition(".")[0] for key in head_tensors(adapter)}),
        "merge": {"exact": False, "reason": "it acts at some positions of a text alone, which no weight does"},
        "swap": {"possible": True, "reason": "a low-rank branch beside the layer, at some positions"},
        "needs_base_weights": False,
    }
