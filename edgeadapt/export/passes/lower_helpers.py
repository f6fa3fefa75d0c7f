"""Write the symbolic helper operators of the tracing as standard ONNX.

- `TotalLength(attention_mask) -> int32[]`: axis 1 of the mask, which GroupQueryAttention wants as a scalar.
- `PositionsFrom(logits_from, input_ids) -> int64[kept]`: logits_from, logits_from + 1, ..., sequence - 1.

`logits_from` becomes an optional input with default [0], so that by default all logits are computed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeadapt.errors import ExportError
from edgeadapt.export.graph import MARKER_DOMAIN


def lower_helpers(model: ir.Model) -> None:
    """Replace the helper operators of `model` in place."""
    graph = model.graph
    for node in list(graph):
        if node.domain != MARKER_DOMAIN or node.op_type in ("AdapterSite", "ParameterSite"):
            continue
        if node.op_type == "TotalLength":
            new = _total_length(node)
        elif node.op_type == "PositionsFrom":
            new = _positions_from(node)
        else:
            raise ExportError(f"unknown helper operator {node.op_type}", hint="this is a bug; please report it")
        graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(node.outputs[0], new[-1].outputs[0])
        graph.remove(node, safe=True)


def set_defaults(model: ir.Model) -> None:
    """Make `logits_from` an optional input with default [0]; after fusion, which would take it for a constant."""
    for value in model.graph.inputs:
        if value.name == "logits_from":
            value.const_value = ir.tensor(np.zeros(1, np.int64), name="logits_from")
            model.graph.register_initializer(value)


def _constant(value: np.ndarray) -> ir.Node:
    return ir.node("Constant", [], attributes={"value": ir.tensor(value)})


def _total_length(node: ir.Node) -> list[ir.Node]:
    shape = ir.node("Shape", [node.inputs[0]], attributes={"start": 1, "end": 2})
    narrow = ir.node("Cast", [shape.outputs[0]], attributes={"to": int(ir.DataType.INT32)})
    scalar = ir.node("Squeeze", [narrow.outputs[0]])
    return [shape, narrow, scalar]


def _positions_from(node: ir.Node) -> list[ir.Node]:
    start = ir.node("Squeeze", [node.inputs[0]])
    shape = ir.node("Shape", [node.inputs[1]], attributes={"start": 1, "end": 2})
    limit = ir.node("Squeeze", [shape.outputs[0]])
    one = _constant(np.array(1, np.int64))
    positions = ir.node("Range", [start.outputs[0], limit.outputs[0], one.outputs[0]])
    return [start, shape, limit, one, positions]
