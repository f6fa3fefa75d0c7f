"""ST-Adapter (Pan et al., arXiv 2206.13559): models of pictures that see clips, in edgeadapt's own layout.

x' = x + fc2(conv(fc1 x)) on the tokens of each frame, the class token left alone, before a layer's attention
(`adapter_pre_attn`), before its feed-forward (`adapter_pre_mlp`), or both; conv is depth-wise over the frames of a
clip, k x 1 x 1. A clip's frames follow each other on the batch axis. Names are those of the authors' code, which has no
activation between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Branch, Library, ResolvedAdapter, TargetModule
from edgeadapt.adapters.fingerprint import base_label
from edgeadapt.adapters.kinds._own import (
    check_parts,
    check_settings,
    check_shape,
    described,
    flag,
    module_at,
    part,
    resolved,
    setting_of,
    whole,
)
from edgeadapt.errors import AdapterError

TERMS: frozenset[str] = frozenset()
SETTINGS = {
    "frames": whole("how many frames a clip has, a whole number of at least 1", 1),
    "pre_attn": flag(default=True),
    "pre_mlp": flag(default=True),
    "skipped": whole("how many tokens before those of the picture stay as they are", 0, 1),
}
_PARTS = {"fc1.weight": 2, "fc1.bias": 1, "conv.weight": 5, "conv.bias": 1, "fc2.weight": 2, "fc2.bias": 1}


@dataclass(frozen=True)
class _Family:
    """Modules of a layer whose outputs are added to the tokens; and what gives the first layer's tokens, or None."""

    attention: str
    feed_forward: str
    first: str | None


_FAMILIES = (
    _Family("self_attn.out_proj", "mlp.fc2", "pre_layrnorm"),  # CLIP's image tower
    _Family("attention.output.dense", "output.dense", None),  # ViT
)


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "edgeadapt" and config["edgeadapt_type"] == "st_adapter"


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`: none.

    Raises:
        AdapterError: a setting is unknown, missing or out of range, or the adapter has no place.
    """
    warnings = check_settings(config, SETTINGS)
    if not _places(config):
        raise AdapterError(
            "pre_attn and pre_mlp are both false: the adapter has no place", hint="write the config as it was trained"
        )
    return warnings


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors: none.

    Raises:
        AdapterError: a tensor is missing, unknown or of a wrong kind.
    """
    return check_parts(
        adapter, {f"{place}.{name}": axes for place in _places(adapter.config) for name, axes in _PARTS.items()}
    )


def resolve(
    adapter: Adapter,
    modules: Mapping[str, TargetModule],
    base_name: str | None = None,
    library: Library | None = None,  # noqa: ARG001 - the files say everything
) -> ResolvedAdapter:
    """Return the adapter as arrays, proven complete against the base's `modules`.

    Raises:
        AdapterError: a layer is not in the base or of an unknown form, or a shape does not fit.
    """
    branches = []
    for layer in adapter.config["modules"]:
        family = _family(layer, modules, base_name)
        for place in _places(adapter.config):
            site, reads = _site(layer, place, family)
            module = module_at(adapter, site, modules, ("linear", "norm"), base_name)
            branches.append(_branch(adapter, f"{layer}.{place}", module, reads))
    return resolved(adapter, modules, base_name, branches=tuple(branches))


def _places(config: Mapping[str, Any]) -> list[str]:
    return [f"adapter_{key}" for key in ("pre_attn", "pre_mlp") if setting_of(config, SETTINGS, key)]


def _family(layer: str, modules: Mapping[str, TargetModule], base_name: str | None) -> _Family:
    numbered = layer.rpartition(".")[2].isdecimal()
    for family in _FAMILIES:
        if numbered and f"{layer}.{family.attention}" in modules and f"{layer}.{family.feed_forward}" in modules:
            return family
    raise AdapterError(
        f"{layer!r} is no layer of CLIP's image tower or of a ViT in {base_label(base_name)}",
        hint="modules names layers, such as vision_model.encoder.layers.0",
    )


def _site(layer: str, place: str, family: _Family) -> tuple[str, str]:
    """Return the module whose output, added to what it reads, is the tokens at that place; and what is read there.

    Tokens before a feed-forward are the attention's output and the residual; before an attention they are the sum
    behind the layer before.
    """
    if place == "adapter_pre_mlp":
        return f"{layer}.{family.attention}", "sum"
    layers, _, index = layer.rpartition(".")
    if int(index) > 0:
        return f"{layers}.{int(index) - 1}.{family.feed_forward}", "sum"
    if family.first is None:
        raise AdapterError(
            f"an adapter before the attention of the first layer {layer!r} has no place in a ViT, whose tokens come "
            "from no module of their own",
            hint="train with pre_attn false, or without the first layer",
        )
    return f"{layers.rpartition('.encoder')[0]}.{family.first}".lstrip("."), "output"


def _branch(adapter: Adapter, where: str, module: TargetModule, reads: str) -> Branch:
    features = module.out_features
    width, _, kernel = part(adapter, where, "conv.weight").shape[:3]
    shapes = {
        "fc1.weight": (width, features),
        "fc1.bias": (width,),
        "conv.weight": (width, 1, kernel + 1 - kernel % 2, 1, 1),
        "conv.bias": (width,),
        "fc2.weight": (features, width),
        "fc2.bias": (features,),
    }
    for name, shape in shapes.items():
        check_shape(adapter, where, name, shape)
    down, down_bias, mix, mix_bias, up, up_bias = (part(adapter, where, name).read() for name in shapes)
    settings: dict[str, str | int] = {
        "reads": reads,
        "frames": int(setting_of(adapter.config, SETTINGS, "frames")),
        "kernel": kernel,
        "skipped": int(setting_of(adapter.config, SETTINGS, "skipped")),
    }
    tensors = {
        "down": np.ascontiguousarray(down.T),
        "down_bias": down_bias,
        "mix": np.ascontiguousarray(mix[:, 0, :, 0, 0].T),
        "mix_bias": mix_bias,
        "up": np.ascontiguousarray(up.T),
        "up_bias": up_bias,
    }
    return Branch(module.path, "frames", settings, tensors)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    widths = {
        part(adapter, f"{layer}.{place}", "fc1.weight").shape[0]
        for layer in adapter.config["modules"]
        for place in _places(adapter.config)
    }
    return described(
        adapter,
        "it mixes a clip's frames, and each frame passes the base alone",
        width={"min": min(widths), "max": max(widths)},
        **{key: setting_of(adapter.config, SETTINGS, key) for key in SETTINGS},
    )
