"""A decoder's key-value cache in int8: a quarter of the memory for what was read.

GroupQueryAttention writes each key and value as round(x / scale), within -128 and 127, and multiplies by the scale when
it reads them. Scales are constants, one per layer, head and channel.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeadapt.errors import QuantizeError
from edgeadapt.export.graph import Graph
from edgeadapt.quantize.rewrite import CONTRIB, store

CODES = 127
"""The largest code."""
HEADROOM = 1.1
"""How much larger a key or value may get than the largest that was measured before it is cut off."""
OWN_SHARE = 0.9
"""Of the logarithm of a channel's range, how much is its own; the rest is that of its head's largest channel. What is
small on some samples is more easily surpassed than what is large (docs/decisions/0008-batches-and-caches.md)."""

_PAST, _SCALES, _INPUTS = 3, 12, 14
_LAYER = re.compile(r"past_key_values\.(\d+)\.key")
_SMALLEST = 1e-6


def scales_of(ranges: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scales float32[heads, 1, dim] for the largest magnitudes float32[heads, dim] that were measured.

    A channel that is always 0 gets a tiny scale: there must be one.
    """
    wide = HEADROOM * ranges**OWN_SHARE * ranges.max(axis=1, keepdims=True) ** (1 - OWN_SHARE)
    scales: NDArray[np.float32] = (np.maximum(wide, _SMALLEST) / CODES).astype(np.float32)
    return scales[:, None, :]


def scale_name(cache_name: str) -> str:
    """Return the name of the constant that holds a cache tensor's scales: "kv_cache.0.key.scale"."""
    return f"kv_cache.{cache_name}.scale"


def is_scale(name: str) -> bool:
    """Tell whether a constant holds scales of the cache."""
    return name.startswith("kv_cache.") and name.endswith(".scale")


def quantize_cache(graph: Graph, scales: Mapping[str, NDArray[np.float32]]) -> Graph:
    """Return `graph` with a decoder that holds keys and values as int8 codes.

    Args:
        graph: ONNX models with markers in place; left as it is.
        scales: by cache name ("0.key"), float32[heads, 1, dim].

    Raises:
        QuantizeError: if the cache is not that of one GroupQueryAttention per layer.
    """
    spec = graph.generation
    if spec is None or not spec.shared_cache:
        raise QuantizeError("this graph has no key-value cache that could be int8", hint="leave out --kv-cache")
    model = graph.models["decoder"].clone()
    attentions = {layer: node for node in model.graph if (layer := _layer(node)) is not None and node.domain == CONTRIB}
    if sorted(attentions) != list(range(spec.cache_layers)):
        raise QuantizeError(
            f"{len(attentions)} of {spec.cache_layers} layers read their cache by GroupQueryAttention, the only "
            "operator that takes int8",
            hint="leave out --kv-cache",
        )
    for layer, node in attentions.items():
        _quantize(model.graph, node, [(name, scales[name]) for name in (f"{layer}.key", f"{layer}.value")])
    for value in (*model.graph.inputs, *model.graph.outputs):
        if str(value.name).startswith(("past_key_values.", "present.")):
            value.type = ir.TensorType(ir.DataType.INT8)
    return dataclasses.replace(
        graph,
        models={**graph.models, "decoder": model},
        generation=dataclasses.replace(spec, cache_dtype="int8"),
    )


def _layer(node: ir.Node) -> int | None:
    """Return the layer whose cache a GroupQueryAttention reads, None for any other node."""
    past = node.inputs[_PAST] if node.op_type == "GroupQueryAttention" and len(node.inputs) > _PAST else None
    found = None if past is None else _LAYER.fullmatch(str(past.name))
    return None if found is None else int(found[1])


def _quantize(graph: ir.Graph, node: ir.Node, scales: list[tuple[str, NDArray[np.float32]]]) -> None:
    node.resize_inputs(_INPUTS)
    for place, (name, values) in enumerate(scales, _SCALES):
        node.replace_input_with(place, store(graph, scale_name(name), values))
    for part in "kv":
        node.attributes[f"{part}_quant_type"] = ir.AttrString(f"{part}_quant_type", "PER_CHANNEL")
    node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
