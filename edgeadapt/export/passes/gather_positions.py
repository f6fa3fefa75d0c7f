"""Read chosen positions of the hidden states with one Gather.

torch writes `hidden[:, positions]` as Transpose, GatherND, Transpose; the head reads it once per step.
"""

from __future__ import annotations

import onnx_ir as ir

_SWAP = [1, 0, 2]


def gather_positions(model: ir.Model) -> int:
    """Replace the pattern in `model` in place and return how often it was found."""
    found = 0
    for node in list(model.graph):
        if node.op_type != "Transpose" or not _swaps(node):
            continue
        gather = _producer(node.inputs[0], "GatherND")
        first = _producer(gather.inputs[0], "Transpose") if gather is not None else None
        positions = _producer(gather.inputs[1], "Unsqueeze") if gather is not None else None
        if gather is None or first is None or positions is None or not _swaps(first):
            continue
        if gather.attributes.get_int("batch_dims", 0) != 0:
            continue
        new = ir.node("Gather", [first.inputs[0], positions.inputs[0]], attributes={"axis": 1})
        new.outputs[0].shape, new.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        model.graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(node.outputs[0], new.outputs[0])
        for old in (node, gather, first, positions):
            if not old.outputs[0].uses():
                model.graph.remove(old, safe=True)
        found += 1
    return found


def _swaps(node: ir.Node) -> bool:
    return list(node.attributes.get_ints("perm", [])) == _SWAP


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None
