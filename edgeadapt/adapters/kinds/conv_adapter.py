"""Conv-Adapter (Chen et al., arXiv 2208.07463): two convolutions beside one of the base's, in edgeadapt's own layout.

y' = y + se (conv2 * act(conv1 * v)), conv1 k x k in groups and conv2 1 x 1, both with bias; v is the input of the
base's convolution (placement "parallel") or its output ("sequential"). y is its output or, where `adds` is "activated",
what the norm and the activation behind it make of that, as in the authors' ResNet-50.
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
    choice,
    described,
    module_at,
    part,
    resolved,
    setting_of,
    whole,
)
from edgeadapt.slots import BOTTLENECK_ACTIVATIONS

TERMS: frozenset[str] = frozenset()
SETTINGS = {
    "placement": choice(("parallel", "sequential"), "parallel"),
    "adds": choice(("output", "activated"), "output"),
    "activation": choice(BOTTLENECK_ACTIVATIONS, "relu"),
    "groups": whole("a whole number of at least 1", 1),
    "stride": whole("a whole number of at least 1", 1, 1),
    "padding": whole("a whole number of at least 0", 0, 1),
    "dilation": whole("a whole number of at least 1", 1, 1),
}
_PARTS = {"conv1.weight": 4, "conv1.bias": 1, "conv2.weight": 4, "conv2.bias": 1, "se": 4}


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "edgeadapt" and config["edgeadapt_type"] == "conv_adapter"


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`: none.

    Raises:
        AdapterError: a setting is unknown, missing or out of range.
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
        AdapterError: a module is not in the base or no convolution, or a shape does not fit.
    """
    branches = []
    for path in adapter.config["modules"]:
        module = module_at(adapter, path, modules, ("conv2d",), base_name)
        branches.append(_branch(adapter, module))
    return resolved(adapter, modules, base_name, branches=tuple(branches))


def _branch(adapter: Adapter, module: TargetModule) -> Branch:
    """Return the two convolutions at one module, se folded into the second."""
    groups, stride, padding, dilation = (
        int(setting_of(adapter.config, SETTINGS, key)) for key in ("groups", "stride", "padding", "dilation")
    )
    parallel = setting_of(adapter.config, SETTINGS, "placement") == "parallel"
    width, _, kernel, _ = part(adapter, module.path, "conv1.weight").shape
    out = module.weight_shape[0]
    shapes = {
        "conv1.weight": (width, (module.in_features if parallel else out) // groups, kernel, kernel),
        "conv1.bias": (width,),
        "conv2.weight": (out, width, 1, 1),
        "conv2.bias": (out,),
        "se": (1, out, 1, 1),
    }
    for name, shape in shapes.items():
        check_shape(adapter, module.path, name, shape)
    down, down_bias, up, up_bias, scale = (part(adapter, module.path, name).read() for name in shapes)
    scale = scale.reshape(-1)
    settings: dict[str, str | int] = {
        "reads": "input" if parallel else "output",
        "adds": str(setting_of(adapter.config, SETTINGS, "adds")),
        "activation": str(setting_of(adapter.config, SETTINGS, "activation")),
        "width": width,
        "kernel": kernel,
        "groups": groups,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    tensors = {
        "down": down,
        "down_bias": down_bias,
        "up": np.ascontiguousarray(up * scale[:, None, None, None]),
        "up_bias": up_bias * scale,
    }
    return Branch(module.path, "conv", settings, tensors)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    widths = {part(adapter, path, "conv1.weight").shape[0] for path in adapter.config["modules"]}
    return described(
        adapter,
        "an activation lies between its convolutions, so they fold into no weight",
        width={"min": min(widths), "max": max(widths)},
        **{key: setting_of(adapter.config, SETTINGS, key) for key in SETTINGS},
    )
