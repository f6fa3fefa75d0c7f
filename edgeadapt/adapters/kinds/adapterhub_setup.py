"""Compositions of AdapterHub as one adapter: Stack (MAD-X: a language, then a task), Fuse (AdapterFusion), Average.

Bottlenecks of a stack are at one module one behind the other, each in a stage of its own; a fusion is an attention over
those of its adapters, in one. What changes weights is read off the library's forward with the whole composition active.
Semantics of adapters 1.3: `composition.py`, `methods/adapter_layer_base.py`, `methods/bottleneck.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgeadapt.adapters.adapter import Adapter, Bottleneck, Library, ResolvedAdapter, TargetModule, TensorRef
from edgeadapt.adapters.from_library import resolve_from_library
from edgeadapt.adapters.hub_heads import resolve_head
from edgeadapt.adapters.hub_keys import FUSIONS, head_tensors, is_in
from edgeadapt.adapters.kinds._bottleneck_resolve import resolve_places
from edgeadapt.adapters.kinds._bottleneck_tensors import places_of
from edgeadapt.adapters.kinds._fusion import check_fusion, check_parts, fused
from edgeadapt.errors import AdapterError

KINDS: Mapping[str, str] = {"adapterhub_setup": "a composition of AdapterHub: Stack, Fuse (AdapterFusion), Average"}
TERMS: frozenset[str] = frozenset()
_ROWS = "export its adapters alone, from their own folders: a session swaps them, and rows of a batch have their own"
_REFUSED: Mapping[str, tuple[str, str]] = {
    "Parallel": ("gives a row of outputs for each adapter and row of inputs: several answers, not one adapter", _ROWS),
    "BatchSplit": ("gives fixed numbers of a batch's rows to different adapters: it is no one adapter", _ROWS),
    "MultiTask": ("chooses the adapter by the task of each row: it is no one adapter", _ROWS),
    "Split": (
        "gives fixed ranges of a text's tokens to different adapters, and runs for texts of just that length alone",
        "train the adapters on whole texts",
    ),
}
REFUSED: Mapping[str, tuple[str, str]] = {f"{name} (AdapterHub)": why for name, why in _REFUSED.items()} | {
    "Average of bottlenecks (AdapterHub)": (
        "the library divides their weighted sum by their number once more, and the base's own output with it",
        "export the adapters alone, and blend them",
    )
}
"""Compositions that are refused by name: the reason, and what to do instead."""
_SEQUENTIAL = "stack adapters as seq_bn and double_seq_bn are (sequential, with the layer's own norm behind them)"


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "adapterhub" and config["config"].get("architecture") == "setup"


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the kind's name."""
    del config
    return "adapterhub_setup"


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`.

    Raises:
        AdapterError: a block is unknown, or none that edgeadapt computes.
    """
    for block in _blocks(config["setup"]):
        name = block["type"]
        if name in _REFUSED:
            reason, hint = _REFUSED[name]
            raise AdapterError(f"the composition {_words(block)} {reason}", hint=hint)
        if name not in ("Stack", "Fuse", "Average"):
            raise AdapterError(f"the composition is of an unknown type {name!r}", hint="update edgeadapt")
        if name == "Fuse" and not all(isinstance(child, str) for child in block["children"]):
            raise AdapterError(
                f"the composition {_words(block)} fuses what is composed itself",
                hint="fuse single adapters; a Stack may hold the Fuse",
            )
    return ()


def _blocks(node: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(node, str):
        yield node
        for child in node["children"]:
            yield from _blocks(child)


def _words(node: Any) -> str:
    """Return a composition as the library writes it."""
    return node if isinstance(node, str) else f"{node['type']}[{', '.join(map(_words, node['children']))}]"


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors, as far as they can be judged without the base.

    Raises:
        AdapterError: an adapter is of a method that cannot be composed, or a fusion's tensors do not fit its config.
    """
    parts: Mapping[str, Adapter] = adapter.config["parts"]
    setup = adapter.config["setup"]
    inside = {name for block in _blocks(setup) if block["type"] == "Fuse" for name in block["children"]}
    for name, part in parts.items():
        layers = part.kind.startswith("adapterhub_") and _has_weights(part)
        if part.kind != "bottleneck" and (not layers or part.kind == "adapterhub_union"):
            raise AdapterError(
                f"the composition {_words(setup)} holds {name!r} of kind {part.kind}, which is not composed yet",
                hint="compose bottlenecks, or adapters that change weights; or export it alone",
            )
        if name in inside and part.kind != "bottleneck":
            raise AdapterError(
                f"the composition {_words(setup)} fuses {name!r} of kind {part.kind}: AdapterFusion is of bottlenecks",
                hint="fuse bottleneck adapters",
            )
    for name, fusion in adapter.config["fusions"].items():
        check_fusion(name, fusion["config"])
        for place, found in _fusions(adapter, name).items():
            check_parts(place, fusion["config"], found)
    first = next(iter(parts))
    return tuple(
        f"the invertible part of {name!r} is not used: the library uses that of the first adapter alone"
        for name, part in parts.items()
        if name != first and any(is_in(("invertible_adapters",), key) for key in part.tensors)
    )


def _has_weights(part: Adapter) -> bool:
    return any(is_in(("loras",), key) for key in part.tensors)


def _fusions(adapter: Adapter, name: str) -> dict[str, dict[str, TensorRef]]:
    """Return a fusion's tensors by place and part."""
    found: dict[str, dict[str, TensorRef]] = {}
    for key, tensor in adapter.tensors.items():
        place, fusion, part = key.removesuffix(f"@{name}").partition(f".{FUSIONS}.")
        if fusion and key.endswith(f"@{name}"):
            found.setdefault(place, {})[part] = tensor
    return found


def resolve(
    adapter: Adapter, modules: Mapping[str, TargetModule], base_name: str | None, library: Library | None
) -> ResolvedAdapter:
    """Return the composition as arrays.

    Raises:
        AdapterError: an adapter does not fit the base, or the composition has no form that the graphs compute.
    """
    parts: Mapping[str, Adapter] = adapter.config["parts"]
    head = resolve_head(adapter, head_tensors(adapter), modules, base_name)
    beside: dict[str, dict[str, Bottleneck]] = {}
    invertible: tuple[Bottleneck, ...] = ()
    for index, (name, part) in enumerate(parts.items()):
        if part.kind == "bottleneck":
            beside[name], first = resolve_places(part, modules, base_name)
            invertible = first if index == 0 else invertible
    composing = _Composing(adapter, beside)
    places = sorted({place for found in beside.values() for place in found})
    bottlenecks = [item for place in places for item in composing.at(place)]
    sites = {}
    if any(_has_weights(part) for part in parts.values()):
        sites = dict(resolve_from_library(adapter, modules, base_name, library).sites)
    return ResolvedAdapter(adapter.name, adapter.kind, sites, head, bottlenecks=(*bottlenecks, *invertible))


class _Composing:
    """Puts together what the adapters of a composition have at one place."""

    def __init__(self, adapter: Adapter, beside: Mapping[str, Mapping[str, Bottleneck]]) -> None:
        self._adapter = adapter
        self._beside = beside
        self._fusions = {name: _fusions(adapter, name) for name in adapter.config["fusions"]}

    def at(self, place: str) -> list[Bottleneck]:
        """Return the bottlenecks of all stages."""
        setup = self._adapter.config["setup"]
        there = [name for name, found in self._beside.items() if place in found]
        if len(there) > 1:
            self._check_together(place, there)
        return self._stages(setup, place, 0)

    def _stages(self, node: Any, place: str, stage: int) -> list[Bottleneck]:
        if isinstance(node, str):
            found = self._beside.get(node, {}).get(place)
            return [] if found is None else [replace(found, stage=stage)]
        if node["type"] == "Fuse":
            return self._fuse(node, place, stage)
        if node["type"] == "Average":
            return self._average(node, place, stage)
        result: list[Bottleneck] = []
        for child in node["children"]:
            result += self._stages(child, place, stage + len(result))
        return result

    def _fuse(self, node: Mapping[str, Any], place: str, stage: int) -> list[Bottleneck]:
        names = [name for name in node["children"] if place in self._beside.get(name, {})]
        found = [self._beside[name][place] for name in names]
        if not found:
            return []
        fusion = ",".join(node["children"])
        parts = self._fusions[fusion].get(place)
        if parts is None or names[-1] != node["children"][-1]:
            missing = f"fusion {fusion!r}" if parts is None else f"adapter {node['children'][-1]!r}"
            raise AdapterError(
                f"{missing} has nothing at {place}, where {names[0]!r} has a bottleneck: the library cannot run it",
                hint="fuse adapters that are in the same layers",
            )
        for name, one in zip(names, found, strict=True):
            if (one.site, one.slot_kind) != (found[0].site, found[0].slot_kind):
                raise AdapterError(
                    f"the fusion {fusion!r} is of adapters that differ in activation or in what they read at {place} "
                    f"({names[0]!r}: {found[0].activation}, {found[0].reads}; {name!r}: {one.activation}, {one.reads})",
                    hint="fuse adapters of one config",
                )
        settings = self._adapter.config["fusions"][fusion]["config"]
        check_fusion(fusion, settings, found[0].reads)
        check_parts(f"{place}.{FUSIONS}", settings, parts, len(found[0].down))
        return [fused(found, parts, stage)]

    def _average(self, node: Mapping[str, Any], place: str, stage: int) -> list[Bottleneck]:
        found = [item for child in node["children"] for item in self._stages(child, place, stage)]
        if len(node["children"]) > 1 and found:
            raise AdapterError(
                f"the composition {_words(node)} averages bottlenecks, and the library divides their weighted sum by "
                "their number once more: the base's own output would shrink with it",
                hint="export the adapters alone, and blend them: `edgeadapt blend` keeps the base's output",
            )
        return found

    def _check_together(self, place: str, names: list[str]) -> None:
        alone = self._adapter.config["setup"]["type"] == "Fuse"  # then nothing is in front of it or behind
        for name in names:
            settings = self._adapter.config["parts"][name].config["config"]
            if settings.get("is_parallel") or not (alone or settings.get("original_ln_after", True)):
                what = "parallel" if settings.get("is_parallel") else "added behind the layer's norm"
                raise AdapterError(
                    f"the composition {_words(self._adapter.config['setup'])} has several adapters at {place}, and "
                    f"{name!r} is {what}: the library then loses the layer's output, or adds its input twice",
                    hint=_SEQUENTIAL,
                )


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    parts: Mapping[str, Adapter] = adapter.config["parts"]
    weights = all(_has_weights(part) for part in parts.values())
    reason = "a bottleneck is not linear in its input and folds into no weight"
    return {
        "composition": _words(adapter.config["setup"]),
        "parts": [{"name": name, "kind": part.kind} for name, part in parts.items()],
        "places": sorted({p.location for a in parts.values() if a.kind == "bottleneck" for p in places_of(a).values()}),
        "modules_to_save": sorted({key.rpartition(".")[0] for key in head_tensors(adapter)}),
        "merge": {
            "exact": weights,
            "reason": "each module's forward is a product, which folds into its weight and bias" if weights else reason,
        },
        "swap": {"possible": True, "reason": "small networks beside the layer, one behind the other or weighed"},
        "needs_base_weights": any(_has_weights(part) for part in parts.values()),
    }
