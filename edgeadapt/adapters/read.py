"""Adapter folders to `Adapter`: files found, kind known, keys normalized, everything checked that needs no base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from edgeadapt import registry
from edgeadapt.adapters.adapter import Adapter, TargetModule
from edgeadapt.adapters.kind import kind_module, known_kinds
from edgeadapt.adapters.peft_files import adapter_folders
from edgeadapt.errors import AdapterError

__all__ = ["LAYOUTS", "fit_to_base", "kind_module", "known_kinds", "read_adapters"]

LAYOUTS = "edgeadapt.adapters.layouts"


def read_adapters(path: Path) -> tuple[Adapter, ...]:
    """Return every adapter in the folder `path`: its own, then those of its sub-folders by name.

    Tensors are not read yet, only the files' headers. An adapter's name is its folder's name; a file that holds
    several tasks gives an adapter for each ("NAME-task0").

    Raises:
        AdapterError: there is no adapter, its kind is unknown, or its files are damaged, incomplete or mean a
            computation that edgeadapt does not do.
    """
    path = Path(path)
    layouts = [registry.load(LAYOUTS, name, AdapterError) for name in registry.names(LAYOUTS)]
    if any(getattr(layout, "is_whole", _never)(path) for layout in layouts):
        found: tuple[tuple[str, Path], ...] = ((path.resolve().name, path),)
    else:
        found = adapter_folders(path, lambda folder: any(layout.holds(folder) for layout in layouts))
    adapters = [_layout_of(folder, layouts).read(name, folder, path) for name, folder in found]
    return tuple(adapter for one in adapters for adapter in _expanded(one))


def fit_to_base(adapter: Adapter, modules: Mapping[str, TargetModule], head_dim: int | None) -> Adapter:
    """Return the adapter with names, rows and axes as its base has them; most layouts have them so already.

    Args:
        adapter: from `read_adapters`.
        modules: the base's, by path.
        head_dim: the features of one of its attention heads; None if it has none.

    Raises:
        AdapterError: the adapter cannot be of this base, or the files leave open what they mean.
    """
    fit = getattr(registry.load(LAYOUTS, adapter.layout, AdapterError), "fit", None)
    fitted: Adapter = adapter if fit is None else fit(adapter, modules, head_dim)
    return fitted


def _never(folder: Path) -> bool:
    """Stand for a layout in which sub-folders hold adapters of their own."""
    del folder
    return False


def _layout_of(folder: Path, layouts: list[ModuleType]) -> ModuleType:
    return next(layout for layout in layouts if layout.holds(folder))


def _expanded(adapter: Adapter) -> tuple[Adapter, ...]:
    expand = getattr(kind_module(adapter.kind), "expand", None)
    expanded: tuple[Adapter, ...] = (adapter,) if expand is None else expand(adapter)
    return expanded
