"""Drop pairs of Reshape that end where they began: splitting heads and joining them again around an attention."""

from __future__ import annotations

import onnx_ir as ir


def drop_reshapes(model: ir.Model) -> int:
    """Remove no-op Reshape pairs from `model` in place and return how many nodes went."""
    graph = model.graph
    before = len(graph)
    for node in list(graph):
        if node.op_type != "Reshape" or node.domain not in ("", "ai.onnx"):
            continue
        inner = node.inputs[0].producer() if node.inputs[0] is not None else None
        if inner is None or inner.op_type != "Reshape" or inner.domain not in ("", "ai.onnx"):
            continue
        source, result = inner.inputs[0], node.outputs[0]
        if source is None or result.is_graph_output() or not _same_shape(source, result):
            continue
        ir.convenience.replace_all_uses_with(result, source)
        graph.remove(node, safe=True)
        if not inner.outputs[0].uses() and not inner.outputs[0].is_graph_output():
            graph.remove(inner, safe=True)
    return before - len(graph)


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    """Return whether both shapes are known and equal, axis by axis; an axis without a name equals none."""
    if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
        return False
    return all(
        a == b and (isinstance(a, int) or a.value is not None) for a, b in zip(one.shape, other.shape, strict=True)
    )
