"""Bottlenecks beside named modules, as speech models and VL-Adapter have them, in edgeadapt's own layout.

y' = y + scaling (up act(down n(y) + bd) + bu) at the output y of each module. With `norm` n is a LayerNorm of the
adapter's own (NeMo's LinearAdapter on Conformer blocks: the module is a block's last norm); with `bias` false there are
no bd and bu. Put at the last linear layers of attention and feed-forward it is Houlsby's form (Whisper; VL-Adapter in
its language model).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from edgeadapt.adapters.adapter import Activation, Adapter, Bottleneck, Library, ResolvedAdapter, TargetModule
from edgeadapt.adapters.kinds._own import (
    check_parts,
    check_settings,
    check_shape,
    choice,
    described,
    flag,
    module_at,
    number,
    part,
    resolved,
    setting_of,
)
from edgeadapt.slots import BOTTLENECK_ACTIVATIONS

TERMS: frozenset[str] = frozenset()
SETTINGS = {
    "activation": choice(BOTTLENECK_ACTIVATIONS, "silu"),
    "norm": flag(default=False),
    "bias": flag(default=True),
    "scaling": number("a number other than 0", lambda value: value != 0, 1.0),
}


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "edgeadapt" and config["edgeadapt_type"] == "linear_adapter"


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
    wanted = {"down.weight": 2, "up.weight": 2}
    if setting_of(adapter.config, SETTINGS, "bias"):
        wanted |= {"down.bias": 1, "up.bias": 1}
    if setting_of(adapter.config, SETTINGS, "norm"):
        wanted |= {"norm.weight": 1, "norm.bias": 1}
    return check_parts(adapter, wanted)


def resolve(
    adapter: Adapter,
    modules: Mapping[str, TargetModule],
    base_name: str | None = None,
    library: Library | None = None,  # noqa: ARG001 - the files say everything
) -> ResolvedAdapter:
    """Return the adapter as arrays, proven complete against the base's `modules`.

    Raises:
        AdapterError: a module is not in the base or of another type, or a shape does not fit.
    """
    found = [
        _bottleneck(adapter, module_at(adapter, path, modules, ("linear", "conv1d", "norm"), base_name))
        for path in adapter.config["modules"]
    ]
    return resolved(adapter, modules, base_name, bottlenecks=tuple(found))


def _bottleneck(adapter: Adapter, module: TargetModule) -> Bottleneck:
    """Return the bottleneck at one module, its scaling and its norm's gain and offset folded in."""
    path, features = module.path, module.out_features
    width = part(adapter, path, "down.weight").shape[0]
    bias, norm = (bool(setting_of(adapter.config, SETTINGS, key)) for key in ("bias", "norm"))
    shapes: dict[str, tuple[int, ...]] = {"down.weight": (width, features), "up.weight": (features, width)}
    shapes |= {"down.bias": (width,), "up.bias": (features,)} if bias else {}
    shapes |= {"norm.weight": (features,), "norm.bias": (features,)} if norm else {}
    for name, shape in shapes.items():
        check_shape(adapter, path, name, shape)
    values = {name: part(adapter, path, name).read() for name in shapes}
    down, up = values["down.weight"].T, values["up.weight"].T
    down_bias, up_bias = (
        values.get(f"{side}.bias", np.zeros(n, np.float32)) for side, n in (("down", width), ("up", features))
    )
    if norm:
        down_bias = down_bias + values["norm.bias"] @ down
        down = values["norm.weight"][:, None] * down
    scale = np.float32(setting_of(adapter.config, SETTINGS, "scaling"))
    arrays = (down, down_bias, up * scale, up_bias * scale)
    activation = cast("Activation", setting_of(adapter.config, SETTINGS, "activation"))
    down, down_bias, up, up_bias = (np.ascontiguousarray(x, np.float32) for x in arrays)
    return Bottleneck(path, "output", activation, norm, down, down_bias, up, up_bias)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    widths = {part(adapter, path, "down.weight").shape[0] for path in adapter.config["modules"]}
    return described(
        adapter,
        "a bottleneck is not linear in its input and folds into no weight",
        width={"min": min(widths), "max": max(widths)},
        **{key: setting_of(adapter.config, SETTINGS, key) for key in SETTINGS},
    )
