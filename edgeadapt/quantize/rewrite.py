"""Put stored weights in place of float ones: the nodes that ONNX Runtime has kernels for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeadapt.quantize.blocks import Blocks
from edgeadapt.quantize.weights import Weight

CONTRIB = "com.microsoft"
ACCURACY_LEVEL = 4
"""MatMulNBits computes with activations rounded to int8 per block: 2 to 3 times faster than float32 on a CPU."""


@dataclass(frozen=True)
class InBlocks:
    """Initializers that hold a matrix in blocks.

    bytes: what the file holds of them; matrices, tables: the names of the codes for MatMulNBits and for Gather
    """

    bytes: int
    matrices: str | None
    tables: str | None

    def codes(self, blocks: Blocks) -> dict[str, NDArray[np.uint8]]:
        """Return the initializers' values for a matrix on the same scales and zero points, by name."""
        packed = blocks.packed_codes()
        values = {} if self.matrices is None else {self.matrices: packed}
        return values if self.tables is None else {**values, self.tables: _rows(packed, blocks)}


def use_blocks(uses: Sequence[Weight], blocks: Blocks) -> InBlocks:
    """Have every node in `uses` read `blocks`, and return what holds it.

    A matrix product becomes MatMulNBits (its bias an Add, which every execution provider has), a Gather
    GatherBlockQuantized. Both read the same scales; their codes differ in shape only, so a file that stores equal
    bytes once holds a tied embedding once.
    """
    owner = _graph(uses[0])
    prefix = f"{uses[0].path}.int{blocks.bits}"
    scales = store(owner, f"{prefix}.scales", blocks.scales)
    packed_zeros = blocks.packed_zero_points()
    zeros = None if packed_zeros is None else store(owner, f"{prefix}.zero_points", packed_zeros)
    codes = blocks.packed_codes()
    matrices: ir.Value | None = None
    tables: ir.Value | None = None
    for use in uses:
        if use.kind == "linear":
            matrices = matrices or store(owner, f"{prefix}.codes", codes)
            _use_matmul(use, blocks, [matrices, scales, zeros])
        else:
            tables = tables or store(owner, f"{prefix}.rows", _rows(codes, blocks))
            _use_gather(use, blocks, [tables, scales, zeros])
    separate = matrices is not None and tables is not None and blocks.in_features % blocks.block_size != 0
    stored = codes.nbytes * (2 if separate else 1) + blocks.scales.nbytes
    return InBlocks(
        stored + (0 if packed_zeros is None else packed_zeros.nbytes),
        None if matrices is None else str(matrices.name),
        None if tables is None else str(tables.name),
    )


def _rows(codes: NDArray[np.uint8], blocks: Blocks) -> NDArray[np.uint8]:
    """Return packed codes as GatherBlockQuantized reads them, uint8[rows, dim * bits / 8], without the padding."""
    return codes.reshape(len(codes), -1)[:, : blocks.in_features * blocks.bits // 8]


def _use_matmul(use: Weight, blocks: Blocks, constants: Sequence[ir.Value | None]) -> None:
    attributes = {
        "K": blocks.in_features,
        "N": len(blocks.codes),
        "bits": blocks.bits,
        "block_size": blocks.block_size,
        "accuracy_level": ACCURACY_LEVEL,
    }
    product = _node("MatMulNBits", [use.node.inputs[0], *constants], attributes, domain=CONTRIB)
    bias = use.node.inputs[2] if use.node.op_type == "Gemm" and len(use.node.inputs) > 2 else None
    if bias is None:
        _replace(use.node, [product])
        return
    product.outputs[0].name = f"{use.node.outputs[0].name}.product"
    product.outputs[0].shape, product.outputs[0].type = use.node.outputs[0].shape, use.node.outputs[0].type
    _replace(use.node, [product, _node("Add", [product.outputs[0], bias], {})])


def _use_gather(use: Weight, blocks: Blocks, constants: Sequence[ir.Value | None]) -> None:
    table, scales, zeros = constants
    attributes = {"bits": blocks.bits, "block_size": blocks.block_size, "gather_axis": 0, "quantize_axis": 1}
    inputs = [table, use.node.inputs[1], scales, zeros]
    _replace(use.node, [_node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB)])


def use_channels(uses: Sequence[Weight], codes: NDArray[np.int8], scales: NDArray[np.float32]) -> tuple[int, str]:
    """Have convolutions read codes int8[out, in/groups, kh, kw] times scales float32[out, 1, 1, 1].

    Returns:
        The bytes in the file, and the name of the codes' initializer.

    As Cast and Mul, which ONNX Runtime folds when it loads the graph, so that the kernels get constant float32 weights
    and run at full speed. A DequantizeLinear is never folded: it would run at every step and keep the kernels from
    packing their weights (measured: 1.5 times slower).
    """
    owner = _graph(uses[0])
    prefix = f"{uses[0].path}.int8"
    stored = store(owner, f"{prefix}.codes", codes)
    cast = _node("Cast", [stored], {"to": ir.DataType.FLOAT})
    cast.outputs[0].name = f"{prefix}.cast"
    factor = store(owner, f"{prefix}.scales", scales)
    product = _node("Mul", [cast.outputs[0], factor], {})
    product.outputs[0].name = f"{prefix}.weight"
    _feed(uses, [cast, product])
    return codes.nbytes + scales.nbytes, str(stored.name)


def use_half(uses: Sequence[Weight], values: NDArray[np.float16]) -> tuple[int, str]:
    """Have every node in `uses` read float16 values as float32; return the bytes in the file and their initializer.

    A Cast on the weight is folded when ONNX Runtime loads the graph; an embedding's rows are cast after the Gather, so
    that the table stays float16 in memory.
    """
    owner = _graph(uses[0])
    stored = store(owner, f"{uses[0].path}.fp16", values)
    products = [use for use in uses if use.kind != "embedding"]
    if products:
        cast = _node("Cast", [stored], {"to": ir.DataType.FLOAT})
        cast.outputs[0].name = f"{uses[0].path}.fp16.cast"
        _feed(products, [cast])
    for use in uses:
        if use.kind == "embedding":
            rows = _node("Gather", [stored, use.node.inputs[1]], {"axis": 0})
            rows.outputs[0].name = f"{use.node.outputs[0].name}.fp16"
            _replace(use.node, [rows, _node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})])
    return values.nbytes, str(stored.name)


def store(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Register `array` as an initializer under `name`, or a name that is still free."""
    free, count = name, 2
    while free in graph.initializers:
        free, count = f"{name}_{count}", count + 1
    tensor = ir.tensor(np.ascontiguousarray(array), name=free)
    value = ir.Value(name=free, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def drop_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Remove an initializer, and the Transpose or Identity nodes behind it, if nothing reads it any more."""
    for user in list(value.consumers()):
        if user.op_type in ("Transpose", "Identity") and not user.outputs[0].is_graph_output():
            drop_unused(graph, user.outputs[0])
            if not user.outputs[0].uses():
                graph.remove(user, safe=True)
    if not value.uses() and not value.is_graph_output() and value.is_initializer() and not value.is_graph_input():
        del graph.initializers[str(value.name)]


def _feed(uses: Sequence[Weight], nodes: Sequence[ir.Node]) -> None:
    """Compute a weight by `nodes`, ahead of all others, and have what read the initializer read their result."""
    owner = _graph(uses[0])
    owner.insert_before(owner[0], nodes)
    weight = nodes[-1].outputs[0]
    weight.shape, weight.type = uses[0].initializer.shape, ir.TensorType(ir.DataType.FLOAT)
    for reader, index in {(id(reader), index): (reader, index) for reader, index in map(_reader, uses)}.values():
        reader.replace_input_with(index, weight)


def _reader(use: Weight) -> tuple[ir.Node, int]:
    """Return the node and its input that read the initializer itself: the use's own, or a Transpose before it."""
    node, index = use.node, use.operand
    while node.inputs[index] is not use.initializer:
        value = node.inputs[index]
        assert value is not None
        producer = value.producer()
        assert producer is not None
        node, index = producer, 0
    return node, index


def _replace(old: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new` in place of `old`; the last one's output takes over the old one's name, shape and readers."""
    assert old.graph is not None
    result, former = new[-1].outputs[0], old.outputs[0]
    result.name, result.shape, result.type = former.name, former.shape, former.type
    new[-1].metadata_props.update(old.metadata_props)
    ir.convenience.replace_nodes_and_values(old.graph, old, [old], list(new), [former], [result])


def _node(kind: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any], *, domain: str = "") -> ir.Node:
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    return ir.node(kind, inputs, attributes, domain=domain)


def _graph(use: Weight) -> ir.Graph:
    graph = use.node.graph
    assert isinstance(graph, ir.Graph)
    return graph
