"""`Adapter` and a base's modules to `ResolvedAdapter`."""

from __future__ import annotations

from collections.abc import Mapping

from edgeadapt.adapters.adapter import Adapter, ResolvedAdapter, TargetModule
from edgeadapt.adapters.read import kind_module
from edgeadapt.errors import AdapterError


def resolve(adapter: Adapter, modules: Mapping[str, TargetModule], *, base_name: str | None = None) -> ResolvedAdapter:
    """Return the adapter as plain arrays at named modules of a base, every scaling folded in.

    `base_name` names the base in error messages.

    Raises:
        AdapterError: the adapter is incomplete or damaged, a tensor has no use, or the base is not the one that the
            adapter was trained on.
    """
    try:
        resolved: ResolvedAdapter = kind_module(adapter.kind).resolve(adapter, modules, base_name)
    except AdapterError as error:
        raise AdapterError(f"adapter {adapter.name!r}: {error.message}", hint=error.hint) from error
    return resolved
