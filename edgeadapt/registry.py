"""Kinds found by file name: adding one is adding one file to a package."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from edgeadapt.errors import EdgeAdaptError


def names(package: str) -> tuple[str, ...]:
    """Return the kinds in `package`, sorted: its public modules' names, nothing imported but the package."""
    module = importlib.import_module(package)
    found = sorted(item.name for item in pkgutil.iter_modules(module.__path__) if not item.name.startswith("_"))
    if not found:
        raise RuntimeError(f"the package {package} holds no kind")
    return tuple(found)


def load(package: str, name: str, error: type[EdgeAdaptError]) -> ModuleType:
    """Return the module of kind `name`.

    Raises:
        EdgeAdaptError: of class `error`, if no such kind exists.
    """
    known = names(package)
    if name not in known:
        noun = package.rsplit(".", 1)[-1].rstrip("s")
        raise error(f"unknown {noun} {name!r}", hint=f"known: {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}")
