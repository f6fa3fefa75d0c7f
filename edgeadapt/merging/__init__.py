"""Adapter meets base: load a base in torch, merge adapters into it, run them unmerged for reference.

Importing this package is light; torch is imported with the names below, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeadapt.merging.fingerprint import stamp_base as stamp_base
    from edgeadapt.merging.load import base_from_module as base_from_module
    from edgeadapt.merging.load import load_base_model as load_base_model

_HOMES = {"base_from_module": "load", "load_base_model": "load", "stamp_base": "fingerprint"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
