"""AdapterFusion: an attention over the outputs of several bottlenecks, its products folded into theirs.

With u_i what bottleneck i adds, q what they read, and the layers query, key and value of the fusion:

    s_i = query(q) . key(u_i)        y' = y + sum_i softmax(s)_i value(u_i)

u_i is a product of the bottleneck's narrow values, so query's and key's weights go into one matrix beside `up`, and
value's into `up`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import Array, Bottleneck, TensorRef
from edgeadapt.errors import AdapterError

_USED = frozenset(
    {"key", "query", "value", "query_before_ln", "residual_before", "temperature", "value_before_softmax"}
)
_TRAINING = frozenset({"regularization", "value_initialized", "dropout_prob"})
_AGAIN = "save it again with save_adapter_fusion"


def check_fusion(name: str, settings: Any, reads: str | None = None) -> None:
    """Check a fusion's settings; with `reads`, also whether they go with what its bottlenecks read.

    Raises:
        AdapterError: a key is unknown, or means a computation that edgeadapt does not do.
    """
    if not isinstance(settings, Mapping):
        raise AdapterError(f"the config of fusion {name!r} is {settings!r}, not a table of settings", hint=_AGAIN)
    unknown = sorted(settings.keys() - _USED - _TRAINING)
    if unknown:
        raise AdapterError(
            f"fusion {name!r}: {unknown[0]} is {settings[unknown[0]]!r}, a setting that edgeadapt does not know",
            hint="update edgeadapt; the setting may change what the fusion computes",
        )
    reason = None
    if settings.get("temperature"):
        reason = "temperature is true: the library lowers it at each call, so no two calls give the same"
    elif settings.get("residual_before"):
        reason = "residual_before is true: the base's own output would go through the fusion's value too"
    elif not any(settings.get(key) for key in ("key", "query", "value")):
        reason = "key, query and value are all false: it would have nothing trained that the library uses"
    elif settings.get("query_before_ln") and reads not in (None, "output"):
        reason = "query_before_ln is true, and its adapters read what is behind the layer's norm"
    if reason is not None:
        raise AdapterError(f"fusion {name!r}: {reason}", hint="train it with the config 'static' or 'dynamic'")


def check_parts(
    place: str, settings: Mapping[str, Any], parts: Mapping[str, TensorRef], size: int | None = None
) -> None:
    """Check that a place has the tensors that the settings ask for, of the right shapes, and no others.

    Raises:
        AdapterError: naming the place.
    """
    wanted: dict[str, int] = {}
    for layer in ("query", "key", "value"):
        if settings.get(layer):
            wanted[f"{layer}.weight"] = 2
            if layer != "value":
                wanted[f"{layer}.bias"] = 1
    if wanted.keys() != parts.keys():
        odd = min(wanted.keys() ^ parts.keys())
        what = "is missing" if odd in wanted else "does not fit its config"
        raise AdapterError(f"tensor '{place}.{odd}' of the fusion {what}", hint=_AGAIN)
    for name, tensor in parts.items():
        if len(tensor.shape) != wanted[name] or (size is not None and set(tensor.shape) != {size}):
            raise AdapterError(
                f"tensor {tensor.key!r} in {tensor.file} has the shape {list(tensor.shape)}"
                + ("" if size is None else f", this base needs {[size] * wanted[name]}"),
                hint="give the base that the fusion was trained on",
            )


def fused(bottlenecks: Sequence[Bottleneck], parts: Mapping[str, TensorRef], stage: int) -> Bottleneck:
    """Return an attention over `bottlenecks`, which read and compute alike; narrower ones are filled up with zeros."""
    features = len(bottlenecks[0].down)
    widest = max(one.down.shape[1] for one in bottlenecks)
    wide = {name: tensor.read().astype(np.float64) for name, tensor in parts.items()}
    identity = np.eye(features)
    query, key, value = (wide.get(f"{layer}.weight", identity).T for layer in ("query", "key", "value"))
    query_bias, key_bias = (wide.get(f"{layer}.bias", np.zeros(features)) for layer in ("query", "key"))
    through = np.concatenate([query.T, query_bias[:, None]], axis=1)  # a key's share of each value of q, and of 1

    def padded(array: Array, axis: int) -> Array:
        width = [(0, 0)] * array.ndim
        width[axis] = (0, widest - array.shape[axis])
        return np.pad(array, width)

    downs = [padded(one.down, 1) for one in bottlenecks]
    down_biases = [padded(one.down_bias, 0)[None] for one in bottlenecks]
    ups = [padded(one.up, 0).astype(np.float64) for one in bottlenecks]
    up_biases = [one.up_bias[None].astype(np.float64) for one in bottlenecks]
    values = ([up @ value for up in ups], [bias @ value for bias in up_biases])
    keys = ([up @ key @ through for up in ups], [(bias @ key + key_bias) @ through for bias in up_biases])
    terms = (np.stack(term).astype(np.float32) for term in (downs, down_biases, *values, *keys))
    down, down_bias, up, up_bias, stacked, stacked_bias = terms
    one = replace(bottlenecks[0], stage=stage, key=stacked, key_bias=stacked_bias)
    return replace(one, down=down, down_bias=down_bias, up=up, up_bias=up_bias)
