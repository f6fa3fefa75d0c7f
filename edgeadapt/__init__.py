"""Trained adapters into swappable, quantized ONNX bundles that run without torch.

    import edgeadapt

    session = edgeadapt.open_session("smol.bundle")
    session.use("support")

Importing the package is light; a name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeadapt.adapters import read_adapters as read_adapters
    from edgeadapt.addition import add_adapter as add_adapter
    from edgeadapt.addition import remove_adapter as remove_adapter
    from edgeadapt.addition import verify_bundle as verify_bundle
    from edgeadapt.bundle import open_bundle as open_bundle
    from edgeadapt.conversion import convert_adapter as convert_adapter
    from edgeadapt.device import Device as Device
    from edgeadapt.device import read_device as read_device
    from edgeadapt.errors import EdgeAdaptError as EdgeAdaptError
    from edgeadapt.merging.fingerprint import stamp_base as stamp_base
    from edgeadapt.merging.load import base_from_module as base_from_module
    from edgeadapt.merging.load import load_base_model as load_base_model
    from edgeadapt.pipeline import export_bundle as export_bundle
    from edgeadapt.profiling.profile import profile as profile
    from edgeadapt.recipe import Recipe as Recipe
    from edgeadapt.recipe import read_recipe as read_recipe
    from edgeadapt.runtime import open_session as open_session

__version__ = "0.1.0"

_HOMES = {
    "Device": "edgeadapt.device",
    "EdgeAdaptError": "edgeadapt.errors",
    "Recipe": "edgeadapt.recipe",
    "add_adapter": "edgeadapt.addition",
    "base_from_module": "edgeadapt.merging.load",
    "convert_adapter": "edgeadapt.conversion",
    "export_bundle": "edgeadapt.pipeline",
    "load_base_model": "edgeadapt.merging.load",
    "open_bundle": "edgeadapt.bundle",
    "open_session": "edgeadapt.runtime",
    "profile": "edgeadapt.profiling.profile",
    "read_adapters": "edgeadapt.adapters",
    "read_device": "edgeadapt.device",
    "read_recipe": "edgeadapt.recipe",
    "remove_adapter": "edgeadapt.addition",
    "stamp_base": "edgeadapt.merging.fingerprint",
    "verify_bundle": "edgeadapt.addition",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - the table above is the list


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
