"""Kinds of adapter: one file each in `edgeadapt/adapters/kinds`, or several kinds in a file that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from edgeadapt import registry
from edgeadapt.errors import AdapterError

KINDS = "edgeadapt.adapters.kinds"


def kind_module(name: str) -> ModuleType:
    """Return the module of an adapter kind.

    Raises:
        AdapterError: there is no such kind.
    """
    for file in registry.names(KINDS):
        module = registry.load(KINDS, file, AdapterError)
        if name in _kinds_in(module, file):
            return module
    raise AdapterError(f"unknown kind {name!r}", hint=f"known: {', '.join(known_kinds())}")


def known_kinds() -> dict[str, str]:
    """Return every kind of adapter and what it is, in one line, sorted by name."""
    found: dict[str, str] = {}
    for file in registry.names(KINDS):
        found |= _kinds_in(registry.load(KINDS, file, AdapterError), file)
    return dict(sorted(found.items()))


def kind_of(layout: str, config: Mapping[str, Any]) -> tuple[ModuleType, str] | None:
    """Return the module and the name of the kind that a config in `layout` is of, None if it is of no known kind."""
    for file in registry.names(KINDS):
        module = registry.load(KINDS, file, AdapterError)
        if module.claims(layout, config):
            return module, module.kind_of(config) if hasattr(module, "KINDS") else file
    return None


def _kinds_in(module: ModuleType, file: str) -> Mapping[str, str]:
    """Return the kinds of one file: those that it lists in `KINDS`, or the one that it is named after."""
    first_line = (module.__doc__ or "").partition("\n")[0]
    kinds: Mapping[str, str] = getattr(module, "KINDS", {file: first_line})
    return kinds
