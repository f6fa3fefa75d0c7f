"""Tip-Adapter (Zhang et al., arXiv 2111.03930): a cache of examples beside a classifier, in edgeadapt's own layout.

logits' = logits + alpha exp(-beta (1 - f keys^T)) values, f what the classifier reads, at length 1; keys are features
of examples, values their classes. More examples are added on the device: `edgeadapt enroll`.
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
from edgeadapt.errors import AdapterError

TERMS: frozenset[str] = frozenset()
SETTINGS = {
    "alpha": number("a number above 0", lambda value: value > 0, 1.0),
    "beta": number("a number above 0", lambda value: value > 0, 5.5),
}
_PARTS = {"keys": 2, "values": 2}


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "edgeadapt" and config["edgeadapt_type"] == "tip_adapter"


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`: none.

    Raises:
        AdapterError: a setting is unknown or out of range, or there are several classifiers.
    """
    if isinstance(config.get("modules"), list) and len(config["modules"]) > 1:
        raise AdapterError(
            f"modules is {config['modules']}, and a tip_adapter has one classifier", hint="name the classifier alone"
        )
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
        AdapterError: the module is not in the base or no linear layer, or a shape does not fit.
    """
    (path,) = adapter.config["modules"]
    module = module_at(adapter, path, modules, ("linear",), base_name)
    saved = adapter.tensors.get(f"{path}.weight")  # a head that is saved whole may have other classes
    classes = module.out_features if saved is None else saved.shape[0]
    rows = part(adapter, path, "keys").shape[0]
    check_shape(adapter, path, "keys", (rows, module.in_features))
    check_shape(adapter, path, "values", (rows, classes))
    tensors = {name: part(adapter, path, name).read() for name in _PARTS}
    alpha, beta = (np.array([setting_of(adapter.config, SETTINGS, key)], np.float32) for key in SETTINGS)
    branch = Branch(path, "cache", {}, {**tensors, "weight": alpha, "sharpness": beta})
    return resolved(adapter, modules, base_name, branches=(branch,))


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    (path,) = adapter.config["modules"]
    return described(
        adapter,
        "what it adds depends on how close an input is to its examples",
        examples=part(adapter, path, "keys").shape[0],
        **{key: setting_of(adapter.config, SETTINGS, key) for key in SETTINGS},
    )
