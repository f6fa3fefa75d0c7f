"""CLIP-Adapter (Gao et al., arXiv 2110.04544): a bottleneck on CLIP's features, in edgeadapt's own layout.

f' = ratio relu(relu(f W1) W2) + (1 - ratio) f, where f is what a projection of CLIP gives (`visual_projection`,
`text_projection`), before it is brought to length 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Branch, Library, ResolvedAdapter, TargetModule
from edgeadapt.adapters.kinds._own import (
    check_parts,
    check_settings,
    check_shape,
    described,
    module_at,
    number,
    part,
    resolved,
    setting_of,
)

TERMS: frozenset[str] = frozenset()
SETTINGS = {"ratio": number("a number from 0 to 1", lambda value: 0 <= value <= 1, 0.2)}
_PARTS = {"fc.0.weight": 2, "fc.2.weight": 2}


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "edgeadapt" and config["edgeadapt_type"] == "clip_adapter"


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`: none.

    Raises:
        AdapterError: a setting is unknown or out of range.
    """
    return check_settings(config, SETTINGS)


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors: none.

    Raises:
        AdapterError: a tensor is missing, unknown or of a wrong kind.
    """
    return check_parts(adapter, _PARTS)


def resolve(
    adapter: Adapter,
    modules: Mapping[str, TargetModule],
    base_name: str | None = None,
    library: Library | None = None,  # noqa: ARG001 - the files say everything
) -> ResolvedAdapter:
    """Return the adapter as arrays, proven complete against the base's `modules`.

    Raises:
        AdapterError: a module is not in the base or no linear layer, or a shape does not fit.
    """
    ratio = np.float32(setting_of(adapter.config, SETTINGS, "ratio"))
    branches = []
    for path in adapter.config["modules"]:
        module = module_at(adapter, path, modules, ("linear",), base_name)
        width, features = part(adapter, path, "fc.0.weight").shape[0], module.out_features
        check_shape(adapter, path, "fc.0.weight", (width, features))
        check_shape(adapter, path, "fc.2.weight", (features, width))
        down, up = (np.ascontiguousarray(part(adapter, path, f"fc.{n}.weight").read().T) for n in (0, 2))
        # ratio relu(z) = relu(ratio z), for it is not below 0
        branches.append(Branch(path, "features", {}, {"down": down, "up": up * ratio, "share": np.array([ratio])}))
    return resolved(adapter, modules, base_name, branches=tuple(branches))


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    widths = {part(adapter, path, "fc.0.weight").shape[0] for path in adapter.config["modules"]}
    return described(
        adapter,
        "its activations are not linear, so it folds into no weight",
        width={"min": min(widths), "max": max(widths)},
        ratio=setting_of(adapter.config, SETTINGS, "ratio"),
    )
