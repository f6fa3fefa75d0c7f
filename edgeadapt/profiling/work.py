"""What one pass of a graph asks of a machine: operators, bytes of memory, arithmetic. Counted from the graph's file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from edgeadapt.errors import ProfileError
from edgeadapt.profiling.graph_file import GraphFile, Node

_INT8_ACCURACY = 4
"""MatMulNBits' accuracy_level with which activations are rounded to int8."""
_LOOKUPS = {"Gather", "GatherBlockQuantized"}
"""They read rows of a table, not all of it."""
_ATTENTION = {"Attention", "GroupQueryAttention", "MultiHeadAttention"}
_WITHOUT_A_COUNT = {
    "Conv", "ConvInteger", "QLinearConv", "ConvTranspose", "FusedConv", "Einsum", "MatMulIntegerToFloat",
    "DynamicQuantizeLSTM", "LSTM", "GRU",
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One pass. nodes: operators run; bytes: read of weights and caches; operations: multiplications and additions."""

    nodes: float
    bytes: float
    int8: float
    float32: float


@dataclass(frozen=True)
class GraphWork:
    """What a graph asks for, by row (a token of one text).

    nodes: operators; weight_bytes: of stored tensors that are read whole, and of the adapter's; adapter_bytes: these
    lowest_bits: of a stored product's number: 4 or 8 where products are quantized in blocks, else 32
    int8_per_row, float32_per_row: operations of products with weights; *_once: of those done for one row only (logits
    of the last position)
    float32_per_pair: operations of attention between a row and one row before it
    """

    nodes: int
    weight_bytes: int
    adapter_bytes: int
    lowest_bits: int
    int8_per_row: int
    int8_once: int
    float32_per_row: int
    float32_once: int
    float32_per_pair: int

    def of(self, rows: int, *, texts: int = 1, context: int = 0, cache_bytes_per_row: int = 0) -> Work:
        """Return the work of one pass.

        Args:
            rows: rows of each text that are read in this pass.
            texts: how many there are.
            context: rows of each text that were read before.
            cache_bytes_per_row: of keys and values.
        """
        pairs = rows * (context + rows)  # ONNX Runtime multiplies whole blocks, also above the diagonal
        return Work(
            nodes=self.nodes,
            bytes=self.weight_bytes + texts * (context + rows) * cache_bytes_per_row,
            int8=texts * (rows * self.int8_per_row + self.int8_once),
            float32=texts * (rows * self.float32_per_row + self.float32_once + pairs * self.float32_per_pair),
        )


@dataclass
class _Sum:
    int8: int = 0
    int8_once: int = 0
    float32: int = 0
    float32_once: int = 0
    pairs: int = 0


def count(graph: GraphFile, *, adapter: Mapping[str, tuple[int, ...]], once_width: int | None = None) -> GraphWork:
    """Return what a graph asks for.

    Args:
        graph: its file's content.
        adapter: shapes of the active adapter's tensors by input name; empty for the plain graph.
        once_width: the vocabulary of a decoder, whose logits are computed for one row.

    Raises:
        ProfileError: if there are operators whose arithmetic cannot be counted from shapes of weights.
    """
    unknown = sorted({node.op_type for node in graph.nodes} & _WITHOUT_A_COUNT)
    if unknown:
        raise ProfileError(
            f"the arithmetic of {', '.join(unknown)} depends on sizes that the graph's file does not say",
            hint="measure this bundle with `edgeadapt profile`",
        )
    shapes = {name: tensor.shape for name, tensor in graph.stored.items()} | dict(adapter)
    total = _Sum()
    for node in graph.nodes:
        if node.op_type in _ATTENTION:
            total.pairs += 4 * _attention_width(node, graph, shapes)  # scores, then the sum of values
        else:
            _add(total, node, shapes, once_width)
    adapter_bytes = sum(4 * math.prod(shape) for shape in adapter.values())
    bits = [node.attributes.get("bits", 4) for node in graph.nodes if node.op_type == "MatMulNBits"]
    return GraphWork(
        nodes=len(graph.nodes),
        weight_bytes=_weight_bytes(graph) + adapter_bytes,
        adapter_bytes=adapter_bytes,
        lowest_bits=min(bits, default=32),
        int8_per_row=total.int8,
        int8_once=total.int8_once,
        float32_per_row=total.float32,
        float32_once=total.float32_once,
        float32_per_pair=total.pairs,
    )


def _attention_width(node: Node, graph: GraphFile, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the width of all heads together: the inner width of the product that reads what they give."""
    for reader in graph.nodes:
        found = _product(reader, shapes) if reader.inputs[:1] == node.outputs[:1] else None
        if found is not None:
            return found[0]
    raise ProfileError(
        f"the width of {node.op_type} {node.name!r} is not known: no product with weights reads it",
        hint="measure this bundle with `edgeadapt profile`",
    )


def _add(total: _Sum, node: Node, shapes: Mapping[str, tuple[int, ...]], once_width: int | None) -> None:
    found = _product(node, shapes)
    if found is None:
        return
    inner, width, int8 = found
    once = width == once_width
    if int8:
        total.int8_once += 2 * inner * width * once
        total.int8 += 2 * inner * width * (not once)
    else:
        total.float32_once += 2 * inner * width * once
        total.float32 += 2 * inner * width * (not once)


def _product(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, bool] | None:
    """Return a product's inner and outer width, and whether it is computed in int8; None if it has no weights."""
    if node.op_type == "MatMulNBits":
        return node.attributes["K"], node.attributes["N"], node.attributes.get("accuracy_level", 0) == _INT8_ACCURACY
    if node.op_type in ("MatMul", "Gemm", "MatMulInteger", "DynamicQuantizeMatMul", "FusedMatMul"):
        shape = shapes.get(node.inputs[1], ())
        if len(shape) != 2:
            return None
        inner, width = shape[::-1] if node.attributes.get("transB") else shape
        return inner, width, node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul")
    return None


def _weight_bytes(graph: GraphFile) -> int:
    """Return the bytes of stored tensors that any operator reads whole, each place once."""
    read = Counter(name for node in graph.nodes if node.op_type not in _LOOKUPS for name in node.inputs)
    places = {tensor.place: tensor.size_bytes for name, tensor in graph.stored.items() if read[name]}
    return sum(places.values())
