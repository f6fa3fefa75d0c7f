"""K-Adapter (Wang et al., arXiv 2002.01808): transformer layers beside an encoder, in edgeadapt's own layout.

At each of a few layers of the base an adapter reads the base's hidden state and the adapter before it:
a_i = v + up(encoder(down v)), v = h_i + a_(i-1), a_0 = 0, its encoder a few layers of BERT's that see all tokens,
padding too. What the head reads is com_dense [h; a] in place of the last hidden state h, or h + a (fusion "add").
Several (`knowledge`) are joined as in the authors' fine-tuning: task_dense [com_1 [h; a_1]; com_2 [h; a_2]]. Names of
tensors are those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, Branch, Library, ResolvedAdapter, TargetModule
from edgeadapt.adapters.fingerprint import base_label
from edgeadapt.adapters.kinds._own import (
    Setting,
    check_axes,
    check_settings,
    check_shape,
    choice,
    described,
    module_at,
    number,
    part,
    resolved,
    setting_of,
    whole,
)
from edgeadapt.errors import AdapterError
from edgeadapt.slots import BOTTLENECK_ACTIVATIONS

TERMS: frozenset[str] = frozenset()
SETTINGS = {
    "last": Setting(
        lambda value: isinstance(value, str) and value != "", "the path of the module that gives the last hidden state"
    ),
    "heads": whole("how many heads an adapter's attention has, a whole number of at least 1", 1),
    "fusion": choice(("concat", "add"), "concat"),
    "knowledge": Setting(
        lambda value: (
            isinstance(value, list)
            and len(set(map(str, value))) == len(value)
            and all(isinstance(name, str) and name and "." not in name for name in value)
        ),
        "a list of different names without dots",
        [],
    ),
    "activation": choice(BOTTLENECK_ACTIVATIONS, "gelu"),
    "layer_norm_eps": number("a number above 0", lambda value: value > 0, 1e-5),
}
_QKV = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
_LAYER = (*_QKV, "attention.output.dense", _NORMS[0], "intermediate.dense", "output.dense", _NORMS[1])


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "edgeadapt" and config["edgeadapt_type"] == "k_adapter"


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
    expected: dict[str, int] = {}
    for place in _places(adapter):
        names = ["down_project", "up_project"]
        names += [f"encoder.layer.{index}.{name}" for index in range(_layers(adapter)) for name in _LAYER]
        for name in names:
            expected |= {f"{place}.{name}.weight": 1 if name.endswith(_NORMS) else 2, f"{place}.{name}.bias": 1}
    for name in _joins(adapter):
        expected |= {f"{adapter.config['last']}.{name}.weight": 2, f"{adapter.config['last']}.{name}.bias": 1}
    return check_axes(adapter, expected)


def resolve(
    adapter: Adapter,
    modules: Mapping[str, TargetModule],
    base_name: str | None = None,
    library: Library | None = None,  # noqa: ARG001 - the files say everything
) -> ResolvedAdapter:
    """Return the adapter as arrays, proven complete against the base's `modules`.

    Raises:
        AdapterError: a module is not in the base or gives no hidden state, or a shape does not fit.
    """
    last = module_at(adapter, adapter.config["last"], modules, ("norm", "linear"), base_name)
    for path in adapter.config["modules"]:
        module = module_at(adapter, path, modules, ("norm", "linear"), base_name)
        if module.out_features != last.out_features:
            raise AdapterError(
                f"module {path!r} gives {module.out_features} numbers a token in {base_label(base_name)}, and the last "
                f"hidden state ({last.path}) has {last.out_features}",
                hint="name modules whose outputs are hidden states in adapter_config.json",
            )
    joins = _joined(adapter, last.out_features)
    branches = []
    for index, join in enumerate(joins):
        tensors = join
        for number_, path in enumerate(adapter.config["modules"]):
            where = _place(adapter, path, index)
            tensors |= {f"{number_}.{key}": value for key, value in _adapter(adapter, where, last.out_features).items()}
        settings = _settings(adapter) | {"order": index, "join": "+".join(sorted(join.keys() & {"a", "h", "present"}))}
        branches.append(Branch(last.path, "knowledge", settings, tensors))
    return resolved(adapter, modules, base_name, branches=tuple(branches))


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    widths = {part(adapter, place, "down_project.weight").shape[0] for place in _places(adapter)}
    return described(
        adapter,
        "it is a network of its own, with an attention, on several hidden states of the base",
        width={"min": min(widths), "max": max(widths)},
        layers=_layers(adapter),
        **{key: setting_of(adapter.config, SETTINGS, key) for key in SETTINGS},
    )


def _names(adapter: Adapter) -> list[str]:
    names: list[str] = setting_of(adapter.config, SETTINGS, "knowledge")
    return names


def _place(adapter: Adapter, path: str, index: int) -> str:
    return f"{path}.{_names(adapter)[index]}" if _names(adapter) else path


def _places(adapter: Adapter) -> list[str]:
    count = max(len(_names(adapter)), 1)
    return [_place(adapter, path, index) for path in adapter.config["modules"] for index in range(count)]


def _layers(adapter: Adapter) -> int:
    """Return how many layers each encoder has, as the first says it: at least 1."""
    start = f"{_places(adapter)[0]}.encoder.layer."
    found = {key.removeprefix(start).partition(".")[0] for key in adapter.tensors if key.startswith(start)}
    return max(len(found), 1)


def _joins(adapter: Adapter) -> list[str]:
    """Return the names of the linear layers that join hidden states."""
    if setting_of(adapter.config, SETTINGS, "fusion") == "add":
        return []
    names = _names(adapter)
    return [*(f"task_dense_{name}" for name in names), "task_dense"] if names else ["com_dense"]


def _settings(adapter: Adapter) -> dict[str, str | int]:
    return {
        "places": ",".join(adapter.config["modules"]),
        "layers": _layers(adapter),
        "heads": int(setting_of(adapter.config, SETTINGS, "heads")),
        "activation": str(setting_of(adapter.config, SETTINGS, "activation")),
        "eps": f"{float(setting_of(adapter.config, SETTINGS, 'layer_norm_eps')):g}",
    }


def _joined(adapter: Adapter, features: int) -> list[dict[str, Array]]:
    """Return what joins each adapter with the last hidden state h: y' = h + h H + sum over i of a_i A_i + bias.

    H and bias come with the first: h, a: float32[1, 1, features, features]; bias: float32[1, 1, 1, features].
    """
    names = _names(adapter)
    if setting_of(adapter.config, SETTINGS, "fusion") == "add":
        return [{"present": np.ones(1, np.float32)} for _ in names or [""]]
    last = adapter.config["last"]
    for name in _joins(adapter):
        width = features * (len(names) if name == "task_dense" else 2)
        check_shape(adapter, last, f"{name}.weight", (features, width))
        check_shape(adapter, last, f"{name}.bias", (features,))
    inner = [_linear(adapter, last, name) for name in _joins(adapter)]
    outer, constant = inner.pop() if names else (np.eye(features), np.zeros(features))
    h, parts = -np.eye(features), []
    for block, (weight, bias) in zip(np.split(outer, len(inner), axis=1), inner, strict=True):
        of_hidden, of_adapter = np.split(weight, 2, axis=1)
        h, constant = h + (block @ of_hidden).T, constant + block @ bias
        parts.append({"a": _float32((block @ of_adapter).T[None, None])})
    parts[0] |= {"h": _float32(h[None, None]), "bias": _float32(constant[None, None, None])}
    return parts


def _linear(adapter: Adapter, path: str, name: str) -> tuple[Array, Array]:
    weight, bias = (part(adapter, path, f"{name}.{which}").read() for which in ("weight", "bias"))
    return weight.astype(np.float64), bias.astype(np.float64)


def _float32(value: Array) -> Array:
    return np.ascontiguousarray(value, np.float32)


def _adapter(adapter: Adapter, where: str, features: int) -> dict[str, Array]:
    """Return one adapter by the form's terms."""
    width = part(adapter, where, "down_project.weight").shape[0]
    heads = int(setting_of(adapter.config, SETTINGS, "heads"))
    if width % heads:
        raise AdapterError(
            f"the adapter at {where!r} is {width} wide, which {heads} heads do not divide",
            hint="write the number of heads that it was trained with in adapter_config.json",
        )
    found = _product(adapter, where, "down_project", (width, features), "down")
    found |= _product(adapter, where, "up_project", (features, width), "up")
    for index in range(_layers(adapter)):
        layer = f"encoder.layer.{index}"
        found |= {f"{index}.{key}": value for key, value in _layer(adapter, where, layer, width, heads).items()}
    return found


def _layer(adapter: Adapter, where: str, layer: str, width: int, heads: int) -> dict[str, Array]:
    """Return one of BERT's layers; its scores' scale is folded into the queries."""
    projections = [_product(adapter, where, f"{layer}.{name}", (width, width), "p") for name in _QKV]
    scale = np.float32(1 / np.sqrt(width / heads))
    projections[0] = {key: value * scale for key, value in projections[0].items()}
    inner = part(adapter, where, f"{layer}.intermediate.dense.weight").shape[0]
    found = {
        "qkv": np.stack([projection["p"] for projection in projections]),
        "qkv_bias": np.stack([projection["p_bias"][None] for projection in projections]),
        **_product(adapter, where, f"{layer}.attention.output.dense", (width, width), "out"),
        **_product(adapter, where, f"{layer}.intermediate.dense", (inner, width), "wide"),
        **_product(adapter, where, f"{layer}.output.dense", (width, inner), "narrow"),
    }
    for term, name in zip(("norm", "norm2"), _NORMS, strict=True):
        for which, key in (("weight", term), ("bias", f"{term}_bias")):
            check_shape(adapter, where, f"{layer}.{name}.{which}", (width,))
            found[key] = part(adapter, where, f"{layer}.{name}.{which}").read()
    return found


def _product(adapter: Adapter, where: str, name: str, shape: tuple[int, int], term: str) -> dict[str, Array]:
    """Return a linear layer as a matrix to multiply with from the right, and its bias."""
    check_shape(adapter, where, f"{name}.weight", shape)
    check_shape(adapter, where, f"{name}.bias", shape[:1])
    weight, bias = (part(adapter, where, f"{name}.{which}").read() for which in ("weight", "bias"))
    return {term: np.ascontiguousarray(weight.T), f"{term}_bias": bias}
