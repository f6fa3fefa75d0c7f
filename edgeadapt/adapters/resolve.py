"""`Adapter` and a base's modules to `ResolvedAdapter`."""

from __future__ import annotations

from collections.abc import Mapping

from edgeadapt.adapters.adapter import Adapter, Library, ResolvedAdapter, TargetModule
from edgeadapt.adapters.read import kind_module
from edgeadapt.errors import AdapterError


def resolve(
    adapter: Adapter,
    modules: Mapping[str, TargetModule],
    *,
    base_name: str | None = None,
    library: Library | None = None,
) -> ResolvedAdapter:
    """Return the adapter as plain arrays at named modules of a base, every scaling folded in.

    Args:
        adapter: the adapter as saved.
        modules: the base's, by path.
        base_name: names the base in error messages.
        library: the library that saved the adapter, on this base; None where there is no torch. Kinds that are read
            through it are refused without it.

    Raises:
        AdapterError: the adapter is incomplete or damaged, a tensor has no use, or the base is not the one that the
            adapter was trained on.
    """
    try:
        resolved: ResolvedAdapter = kind_module(adapter.kind).resolve(adapter, modules, base_name, library)
    except AdapterError as error:
        raise AdapterError(f"adapter {adapter.name!r}: {error.message}", hint=error.hint) from error
    return resolved
