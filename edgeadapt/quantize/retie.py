"""Heads that a trace has torn from their embedding: one constant again, so that it is stored once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeadapt.quantize.blocks import ROWS_AT_ONCE
from edgeadapt.quantize.rewrite import drop_unused
from edgeadapt.quantize.weights import Weight, find_weights


def retie(model: ir.Model) -> None:
    """Have matrix products read the embedding's constant where their own is its transposed copy, bit for bit.

    Constant folding makes such copies of tied heads. ONNX Runtime folds the Transpose again when it loads the graph.
    """
    weights = [weight for weight in find_weights(model) if weight.refusal is None]
    tables = {weight.shape: weight for weight in weights if weight.kind == "embedding"}
    for weight in weights:
        table = tables.get(weight.shape[::-1]) if weight.kind == "linear" and weight.transposed else None
        if table is not None and weight.node.inputs[weight.operand] is weight.initializer and _is_copy(weight, table):
            graph = weight.node.graph
            assert isinstance(graph, ir.Graph)
            transpose = ir.node("Transpose", [table.initializer], {"perm": [1, 0]})
            turned = transpose.outputs[0]
            turned.name = f"{weight.initializer.name}.tied"
            turned.shape, turned.type = weight.initializer.shape, weight.initializer.type
            graph.insert_before(weight.node, [transpose])
            weight.node.replace_input_with(weight.operand, turned)
            drop_unused(graph, weight.initializer)


def _is_copy(weight: Weight, table: Weight) -> bool:
    copy, original = weight.tensor.numpy().T, table.tensor.numpy()
    return all(
        np.array_equal(copy[first : first + ROWS_AT_ONCE], original[first : first + ROWS_AT_ONCE])
        for first in range(0, len(original), ROWS_AT_ONCE)
    )
