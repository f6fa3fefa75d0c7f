"""Products that read the same input, computed as one: q, k and v of an attention, gate and up of a gated layer.

A product of one token costs as much for the call as for the arithmetic, and so does each branch of an adapter beside
it. Rows of quantized weights are independent of each other, so the joined product gives the very numbers of its parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeadapt.export.graph import ADAPTER_SITE, MARKER_DOMAIN
from edgeadapt.quantize.rewrite import CONTRIB, drop_unused

_QKV_INPUTS = 3


@dataclass(frozen=True)
class _Part:
    """One module's product: MatMulNBits, a constant bias added to it or None, its marker."""

    product: ir.Node
    bias: ir.Node | None
    marker: ir.Node

    @property
    def site(self) -> str:
        return self.marker.attributes["site"].as_string()

    @property
    def width(self) -> int:
        return self.product.attributes["N"].as_int()


def join_products(model: ir.Model, apart: Collection[str] = ()) -> None:
    """Join MatMulNBits products of sibling modules with one input, in place; their markers become one with `sites`.

    Joined are modules with the same parent that read the same value and are stored alike (bits, block size, zero
    points). What follows gets its part by a Split, GroupQueryAttention the whole. Modules in `apart` are left alone:
    an adapter scales the input of one of them, and not the others'.
    """
    graph = model.graph
    groups: dict[tuple[object, ...], list[_Part]] = {}
    for node in graph:
        marker = node.domain == MARKER_DOMAIN and node.op_type == ADAPTER_SITE
        if marker and (part := _part(node)) is not None and part.site not in apart:
            groups.setdefault(_kind(part), []).append(part)
    for parts in groups.values():
        if len(parts) > 1 and len({part.site for part in parts}) == len(parts):
            _join(graph, parts)


def sites_of(marker: ir.Node) -> tuple[str, ...]:
    """Return the modules whose outputs lie behind `marker` one after the other: one, or those of a joined product."""
    if "sites" in marker.attributes:
        return tuple(marker.attributes["sites"].as_strings())
    return (marker.attributes["site"].as_string(),)


def joined_name(sites: Iterable[str]) -> str:
    """Return the name of several sibling modules: "layers.0.mlp.gate_proj+up_proj"."""
    names = [site.rpartition(".") for site in sites]
    return f"{names[0][0]}{names[0][1]}{'+'.join(name for _, _, name in names)}"


def _part(marker: ir.Node) -> _Part | None:
    """Return the product that `marker` passes, if nothing else reads it or its constants."""
    x, y = marker.inputs
    bias = None
    node = _only_producer(y)
    if node is not None and node.op_type == "Add":
        bias, node = node, _only_producer(node.inputs[0])
        if not _is_own_constant(bias.inputs[1]):
            return None
    if node is None or (node.domain, node.op_type) != (CONTRIB, "MatMulNBits") or node.inputs[0] is not x:
        return None
    if len(node.inputs) > 4 or not all(_is_own_constant(value) for value in node.inputs[1:] if value is not None):
        return None
    return _Part(node, bias, marker)


def _only_producer(value: ir.Value | None) -> ir.Node | None:
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return value.producer()


def _is_own_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.is_initializer() and len(value.uses()) == 1


def _kind(part: _Part) -> tuple[object, ...]:
    """Return what parts of one joined product have in common."""
    node = part.product
    attributes = tuple(sorted((name, a.value) for name, a in node.attributes.items() if name != "N"))
    given = tuple(value is not None for value in node.inputs[1:])
    return id(node.inputs[0]), part.site.rpartition(".")[0], attributes, given


def _join(graph: ir.Graph, parts: list[_Part]) -> None:
    first = parts[0].product
    name = joined_name(part.site for part in parts)
    inputs: list[ir.Value | None] = [first.inputs[0]]
    for place, value in enumerate(first.inputs[1:], start=1):
        kind = "" if value is None else str(value.name).rpartition(".")[2]
        inputs.append(None if value is None else _concatenated(graph, parts, place, f"{name}.{kind}"))
    if any(part.bias is not None for part in parts):
        inputs += [None] * (5 - len(inputs)) + [_bias(graph, parts, f"{name}.bias")]
    attributes = dict(first.attributes.items())
    attributes["N"] = ir.AttrInt64("N", sum(part.width for part in parts))
    product = ir.Node(CONTRIB, "MatMulNBits", inputs, attributes.values())
    product.outputs[0].type = first.outputs[0].type
    sites = ir.AttrStrings("sites", [part.site for part in parts])
    marker = ir.Node(MARKER_DOMAIN, ADAPTER_SITE, [first.inputs[0], product.outputs[0]], [sites])
    of_first = parts[0].marker.outputs[0]
    marker.outputs[0].type = of_first.type
    if of_first.shape is not None:
        marker.outputs[0].shape = ir.Shape([*of_first.shape[:-1], attributes["N"].value])
    graph.insert_before(first, [product, marker])
    outputs = [part.marker.outputs[0] for part in parts]
    attention = _attention_of(outputs)
    if attention is not None:
        attention.replace_input_with(0, marker.outputs[0])
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
    else:
        _split(graph, marker, parts)
    _remove(graph, parts)


def _split(graph: ir.Graph, marker: ir.Node, parts: list[_Part]) -> None:
    sizes = ir.Value(name=f"{marker.name or marker.outputs[0].name}.sizes")
    sizes.name = f"{joined_name(sites_of(marker))}.widths"
    sizes.const_value = ir.tensor(np.array([part.width for part in parts], np.int64), name=sizes.name)
    sizes.type, sizes.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(parts)])
    graph.register_initializer(sizes)
    split = ir.node("Split", [marker.outputs[0], sizes], attributes={"axis": -1}, num_outputs=len(parts))
    graph.insert_after(marker, split)
    for part, output in zip(parts, split.outputs, strict=True):
        old = part.marker.outputs[0]
        output.type, output.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, output)


def _attention_of(outputs: list[ir.Value]) -> ir.Node | None:
    """Return the GroupQueryAttention that reads exactly these as query, key and value, if there is one."""
    uses = [list(output.uses()) for output in outputs]
    if len(outputs) != _QKV_INPUTS or any(len(found) != 1 for found in uses):
        return None
    node = uses[0][0].node
    in_order = all(found[0].node is node and found[0].idx == index for index, found in enumerate(uses))
    return node if in_order and node.op_type == "GroupQueryAttention" else None


def _concatenated(graph: ir.Graph, parts: list[_Part], place: int, name: str) -> ir.Value:
    arrays = []
    for part in parts:
        value = part.product.inputs[place]
        assert value is not None
        assert value.const_value is not None
        arrays.append(value.const_value.numpy())
    return _initializer(graph, name, np.concatenate(arrays))


def _bias(graph: ir.Graph, parts: list[_Part], name: str) -> ir.Value:
    arrays = []
    for part in parts:
        value = None if part.bias is None else part.bias.inputs[1]
        constant = None if value is None else value.const_value
        arrays.append(np.zeros(part.width, np.float32) if constant is None else constant.numpy().reshape(-1))
    return _initializer(graph, name, np.concatenate(arrays))


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _remove(graph: ir.Graph, parts: list[_Part]) -> None:
    for part in parts:
        nodes = [node for node in (part.marker, part.bias, part.product) if node is not None]
        constants = [value for node in nodes[1:] for value in node.inputs[1:] if value is not None]
        graph.remove(nodes, safe=True)
        for value in constants:
            drop_unused(graph, value)
