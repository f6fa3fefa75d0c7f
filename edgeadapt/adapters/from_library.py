"""Adapters that are read off their library's own forward: from weights in effect to the cheapest updates."""

from __future__ import annotations

from collections.abc import Mapping

from edgeadapt.adapters.adapter import Adapter, Array, Effective, Library, ResolvedAdapter, SiteUpdate, TargetModule
from edgeadapt.adapters.factor import factor
from edgeadapt.adapters.fingerprint import base_label, check_digest, check_unrounded
from edgeadapt.adapters.selection import is_saved
from edgeadapt.errors import AdapterError


def resolve_from_library(
    adapter: Adapter,
    modules: Mapping[str, TargetModule],
    base_name: str | None,
    library: Library | None,
    *,
    replaced: Mapping[str, Array] | None = None,
) -> ResolvedAdapter:
    """Return the adapter as the cheapest updates that give what its library's own forward computes.

    Args:
        adapter: the adapter as saved.
        modules: the base's, with their values.
        base_name: names the base in error messages.
        library: the library at work on the base.
        replaced: parameters that the adapter replaces beside what the library tells (a head), by name.

    Raises:
        AdapterError: there is no library, the base is another one, a value is not finite, or nothing changes.
    """
    if library is None:
        raise AdapterError(
            f"{_article(adapter.kind)} {adapter.kind} adapter can only be read together with the float base, which a "
            "bundle does not hold",
            hint="pass the base with --base, or export the bundle again together with it",
        )
    check_unrounded(adapter.base, {path: path for path in modules}, modules, base_name)
    for path, module in modules.items():
        check_digest(adapter.base, (path,), module, base_name)
    for tensor in adapter.tensors.values():
        tensor.read()  # refuses what is not finite
    sites: dict[str, SiteUpdate] = {}
    parameters: dict[str, Array] = dict(replaced or {})
    for path, now in sorted(library.effective(adapter).items()):
        module = modules[path]
        if _whole(adapter, module, now):
            parameters |= _parameters(module, now)
        elif (update := factor(module, now)) is not None:
            sites[path] = update
    if not sites and not parameters:
        raise AdapterError(
            f"it changes nothing in {base_label(base_name)}: with it every module computes what it did before",
            hint="check that it was trained before it was saved",
        )
    return ResolvedAdapter(adapter.name, adapter.kind, sites, parameters)


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _whole(adapter: Adapter, module: TargetModule, now: Effective) -> bool:
    """Tell whether a module's parameters are replaced instead of updated."""
    if module.type in ("norm", "other") or now.weight.shape != module.weight_shape:
        return True
    return is_saved(adapter.config, module.path) or (module.type == "conv2d" and module.groups > 1)


def _parameters(module: TargetModule, now: Effective) -> dict[str, Array]:
    found = {f"{module.path}.weight": now.weight}
    if now.bias is not None:
        found[f"{module.path}.bias"] = now.bias
    return found
