"""Bottleneck adapters as AdapterHub saves them: Houlsby, Pfeiffer, parallel, Compacter, AdapterPlus and between them.

h' = h + s f(v Wd + bd) Wu + s bu after the attention's or the feed-forward's last product of a layer; what v is follows
from the settings and from whether the layer normalizes before or after: see `_place`. Semantics of adapters 1.3:
`methods/bottleneck.py`, `methods/modeling.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from edgeadapt.adapters.adapter import Adapter, Library, ResolvedAdapter, TargetModule
from edgeadapt.adapters.hub_keys import head_tensors
from edgeadapt.adapters.kinds._bottleneck_config import block_of, check_config, is_bottleneck
from edgeadapt.adapters.kinds._bottleneck_resolve import resolve_bottleneck
from edgeadapt.adapters.kinds._bottleneck_tensors import check_parts, places_of

TERMS: frozenset[str] = frozenset()


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "adapterhub" and is_bottleneck(config)


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`.

    Raises:
        AdapterError: `config` means a computation that edgeadapt does not do, or is damaged.
    """
    return check_config(config)


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors, as far as they can be judged without the base.

    Raises:
        AdapterError: a tensor is missing, empty, unknown or of a wrong kind.
    """
    return check_parts(adapter)


def resolve(
    adapter: Adapter,
    modules: Mapping[str, TargetModule],
    base_name: str | None = None,
    library: Library | None = None,  # noqa: ARG001 - the files say everything
) -> ResolvedAdapter:
    """Return the adapter as arrays, proven complete against the base's `modules`.

    Raises:
        AdapterError: a layer has no tensors, a tensor has no use, or the base does not fit.
    """
    return resolve_bottleneck(adapter, modules, base_name)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    settings = adapter.config["config"]
    widths = Counter(place.width for place in places_of(adapter).values())
    return {
        "places": sorted({place.location for place in places_of(adapter).values()}),
        "width": {"min": min(widths), "max": max(widths), "places": {str(w): n for w, n in sorted(widths.items())}},
        "activation": settings["non_linearity"],
        "invertible": block_of(settings),
        "parallel": bool(settings.get("is_parallel")),
        "hypercomplex": bool(settings.get("phm_layer")),
        "scaling": settings.get("scaling", 1.0),
        "modules_to_save": sorted({key.rpartition(".")[0] for key in head_tensors(adapter)}),
        "merge": {"exact": False, "reason": "a bottleneck is not linear in its input and folds into no weight"},
        "swap": {"possible": True, "reason": "a small network beside the layer"},
        "needs_base_weights": False,
    }
