"""Give rotary embeddings the positions of every row.

The fusion writes what the model computes, one row of positions for all of a batch; ONNX Runtime's RotaryEmbedding wants
as many rows as there are texts.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def rotary_rows(model: ir.Model) -> int:
    """Repeat the positions of RotaryEmbedding nodes in `model` for each row, in place; return how many were repeated.

    Positions with one row only, [1, length], become [batch, length].
    """
    repeated: dict[tuple[int, int], ir.Value] = {}
    found = 0
    for node in list(model.graph):
        if (node.domain, node.op_type) != ("com.microsoft", "RotaryEmbedding"):
            continue
        x, positions = node.inputs[0], node.inputs[1]
        if x is None or positions is None or positions.shape is None:
            continue
        rows = positions.shape[0] if len(positions.shape) == 2 else None
        if rows != 1 or (x.shape is not None and x.shape[0] == 1):
            continue
        key = id(positions), id(x.shape[0]) if x.shape is not None else id(x)
        if key not in repeated:
            repeated[key] = _repeat(model.graph, node, x, positions)
        node.replace_input_with(1, repeated[key])
        found += 1
    return found


def _repeat(graph: ir.Graph, node: ir.Node, x: ir.Value, positions: ir.Value) -> ir.Value:
    one = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([1], np.int64))})
    rows = ir.node("Shape", [x], attributes={"start": 0, "end": 1})
    shape = ir.node("Concat", [rows.outputs[0], one.outputs[0]], attributes={"axis": 0})
    expand = ir.node("Expand", [positions, shape.outputs[0]])
    expand.outputs[0].type = positions.type
    graph.insert_before(node, [one, rows, shape, expand])
    return expand.outputs[0]
