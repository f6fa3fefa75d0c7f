"""Several methods in one adapter of AdapterHub (`ConfigUnion`, MAM): each part is resolved by its own kind.

The parts work at different places of the base, or at one place one after the other as everywhere in a slots graph: what
changes a module's weight first, then bottlenecks beside it, then ReFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from edgeadapt.adapters.adapter import (
    Adapter,
    Array,
    Bottleneck,
    Branch,
    Effective,
    Library,
    Prefix,
    ResolvedAdapter,
    SiteUpdate,
    TargetModule,
)
from edgeadapt.adapters.hub_keys import is_in, is_of_head
from edgeadapt.adapters.kind import kind_of as find_kind
from edgeadapt.adapters.kinds._bottleneck_tensors import is_of_config
from edgeadapt.errors import AdapterError

KINDS: Mapping[str, str] = {"adapterhub_union": "several methods in one adapter of AdapterHub (MAM and other unions)"}
TERMS: frozenset[str] = frozenset()
_CONTAINERS: Mapping[str | None, tuple[str, ...]] = {
    None: ("adapters", "invertible_adapters"),
    "lora": ("loras",),
    "prefix_tuning": ("prefix_tunings", "prefix_gates"),
    "reft": ("refts",),
}
_ONCE = {"prefix_tuning": "prefixes", "reft": "ReFTs"}
"""Methods of which the library puts one alone into a model, and what two of them are called."""
_AGAIN = "save the adapter again with save_adapter"


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "adapterhub" and config["config"].get("architecture") == "union"


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the kind's name."""
    del config
    return "adapterhub_union"


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`.

    Raises:
        AdapterError: there are no parts, two are prefixes, or one is refused.
    """
    warnings: list[str] = []
    for index, part in enumerate(_parts(config)):
        module, _ = _kind_of_part(config, part, index)
        try:
            _refuse_direft(part)
            # said, so that nobody is told how to say that it is DiReFT
            said = {"subtract_projection": True} if part.get("architecture") == "reft" else {}
            warnings += module.check({**config, "config": {**part, **said}})
        except AdapterError as error:
            raise AdapterError(f"configs[{index}]: {error.message}", hint=error.hint) from error
    return tuple(warnings)


def _refuse_direft(part: Mapping[str, Any]) -> None:
    if part.get("architecture") == "reft" and not part.get("subtract_projection", True):
        raise AdapterError(
            "subtract_projection is false, and in a union the library trains and computes DiReFT as NoReFT",
            hint="leave it out: the adapter is then what the library computes",
        )


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    parts = config["config"].get("configs")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, Mapping) for part in parts):
        raise AdapterError(f"configs is {parts!r}, not a list of settings", hint=_AGAIN)
    for method, names in _ONCE.items():
        if len([part for part in parts if part.get("architecture") == method]) > 1:
            raise AdapterError(f"it holds two {names}", hint="train one for all layers")
    return parts


def _kind_of_part(config: Mapping[str, Any], part: Mapping[str, Any], index: int) -> tuple[ModuleType, str]:
    found = find_kind("adapterhub", {**config, "config": part})
    if found is None or part.get("architecture") not in _CONTAINERS:
        raise AdapterError(
            f"configs[{index}]: architecture {part.get('architecture')!r} is not supported in a union",
            hint="train the parts that are, or each alone",
        )
    return found


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors, as far as they can be judged without the base.

    Raises:
        AdapterError: a tensor is of no part, or a part's kind refuses its own.
    """
    warnings: list[str] = []
    parts = _split(adapter)
    used = {key for part, _ in parts for key in part.tensors}
    if strange := sorted(adapter.tensors.keys() - used):
        tensor = adapter.tensors[strange[0]]
        raise AdapterError(f"tensor {tensor.key!r} in {tensor.file} is of none of its parts", hint=_AGAIN)
    for part, module in parts:
        warnings += module.check_tensors(part)
    return tuple(warnings)


def _split(adapter: Adapter) -> list[tuple[Adapter, ModuleType]]:
    """Return the parts, each with its own tensors; the first has the head."""
    found = []
    for index, settings in enumerate(_parts(adapter.config)):
        module, kind = _kind_of_part(adapter.config, settings, index)
        tensors = {
            key: tensor
            for key, tensor in adapter.tensors.items()
            if (index == 0 if is_of_head(key) else _is_of(settings, key))
        }
        config = {**adapter.config, "config": settings}
        found.append((replace(adapter, kind=kind, config=config, tensors=tensors), module))
    return found


def _is_of(settings: Mapping[str, Any], key: str) -> bool:
    method = settings.get("architecture")
    shared = "shared_parameters" in key.split(".")
    if method is None:  # several configs may have bottlenecks, each at places of its own
        return not (shared and key.rpartition(".")[2].startswith("lora_")) and is_of_config(settings, key)
    return key.rpartition(".")[2].startswith("lora_") if shared else is_in(_CONTAINERS[method], key)


class _OfWhole:
    """A library that is asked about a part, and runs the whole adapter: its files hold all parts."""

    def __init__(self, library: Library, whole: Adapter) -> None:
        self._library, self._whole = library, whole

    def effective(self, part: Adapter) -> Mapping[str, Effective]:
        del part
        return self._library.effective(self._whole)

    def past(self, part: Adapter) -> tuple[tuple[Array, Array], ...]:
        del part
        return self._library.past(self._whole)


def resolve(
    adapter: Adapter, modules: Mapping[str, TargetModule], base_name: str | None, library: Library | None
) -> ResolvedAdapter:
    """Return what the parts come to together.

    Raises:
        AdapterError: a part's kind refuses it.
    """
    inner = None if library is None else _OfWhole(library, adapter)
    sites: dict[str, SiteUpdate] = {}
    replaced: dict[str, Array] = {}
    prefix: Prefix | None = None
    bottlenecks: tuple[Bottleneck, ...] = ()
    branches: tuple[Branch, ...] = ()
    for part, module in _split(adapter):
        resolved: ResolvedAdapter = module.resolve(part, modules, base_name, inner)
        sites |= resolved.sites
        replaced |= resolved.replaced
        prefix = prefix or resolved.prefix
        bottlenecks += resolved.bottlenecks
        branches += resolved.branches
    return ResolvedAdapter(adapter.name, adapter.kind, sites, replaced, prefix, bottlenecks, branches)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    parts = [{"kind": part.kind, **module.describe(part)} for part, module in _split(adapter)]
    exact = all(part["merge"]["exact"] for part in parts)
    reasons = [part["merge"]["reason"] for part in parts if part["merge"]["exact"] == exact]
    return {
        "parts": parts,
        "merge": {"exact": exact, "reason": "; ".join(dict.fromkeys(reasons))},
        "swap": {"possible": True, "reason": "; ".join(part["swap"]["reason"] for part in parts)},
        "needs_base_weights": any(part["needs_base_weights"] for part in parts),
    }
