"""Which constants of a marked model are weights, whose module's they are, and how they lie in memory.

A linear layer is a MatMul, Gemm or FusedMatMul with a constant matrix, a convolution a Conv, an embedding a Gather of
whole rows. Its module is the `AdapterSite` marker that its output reaches, through a bias Add or a Reshape at most;
a weight without a marker goes by its initializer's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeadapt.export.graph import ADAPTER_SITE, MARKER_DOMAIN, PARAMETER_SITE

Float = NDArray[np.float32]
WeightKind = Literal["linear", "embedding", "conv"]

MATRIX_OPERATORS = ("MatMul", "Gemm", "FusedMatMul")
SMALLEST_ELEMENTS = 1024
"""A weight with fewer numbers stays float32: it saves nothing that counts."""

_TO_SITE = ("Add", "Reshape", "Identity", "Cast", "Mul")
_TO_OUTPUT = (*_TO_SITE, "Div", "Tanh", "Slice", "Squeeze", ADAPTER_SITE)


@dataclass(frozen=True)
class Weight:
    """One use of one constant as a weight.

    path: module path, or the initializer's name where no marker tells
    operand: the node's input that holds the weight (1, or 0 for a Gather)
    transposed: the initializer lies as [in, out]; otherwise [out, in], an embedding [num_embeddings, dim] and a
        convolution [out, in/groups, kh, kw]
    is_head: its output is an output of the model, or an embedding reads the same initializer
    refusal: why it must stay float32, or None
    """

    path: str
    kind: WeightKind
    node: ir.Node
    initializer: ir.Value
    operand: int
    transposed: bool
    is_head: bool
    refusal: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The initializer's shape."""
        return tuple(self.tensor.shape.numpy())

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The constant as it is stored."""
        assert self.initializer.const_value is not None
        return self.initializer.const_value

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return int(np.prod(self.shape))

    def matrix(self) -> Float:
        """Return float32[out, in] (embedding: [num_embeddings, dim]), C order; a copy where it lies transposed."""
        values = np.asarray(self.tensor.numpy(), np.float32)
        return np.ascontiguousarray(values.T if self.transposed else values)


def find_weights(model: ir.Model) -> tuple[Weight, ...]:
    """Return every weight of `model` in the order of its nodes.

    Overridable initializers can change after export and are left out. Constants behind a `ParameterSite` are listed
    with a refusal.
    """
    found = []
    for node in model.graph:
        located = _locate(node)
        if located is not None:
            kind, operand, initializer, transposed, replaced = located
            site = _site(node.outputs[0])
            found.append(
                Weight(
                    path=site or str(initializer.name),
                    kind=kind,
                    node=node,
                    initializer=initializer,
                    operand=operand,
                    transposed=transposed,
                    is_head=kind == "linear" and (_is_output(node.outputs[0]) or _is_tied(initializer)),
                    refusal="replaced by an adapter" if replaced else _refusal(node, kind, initializer),
                )
            )
    return tuple(found)


def _locate(node: ir.Node) -> tuple[WeightKind, int, ir.Value, bool, bool] | None:
    """Return (kind, operand, initializer, lies as [in, out], is replaced) if `node` has a constant weight."""
    kind, operand, rank = _role(node)
    if kind is None:
        return None
    source, turned, replaced = _constant(node.inputs[operand])
    if source is None or source.const_value is None or source.const_value.dtype != ir.DataType.FLOAT:
        return None
    if (rank and len(source.const_value.shape) != rank) or (turned and kind != "linear"):
        return None
    transposed = kind == "linear" and turned == bool(_attribute(node, "transB", 0))
    return kind, operand, source, transposed, replaced


def _role(node: ir.Node) -> tuple[WeightKind | None, int, int | None]:
    """Return (kind, operand with the weight, its rank or None for any) by the node's operator."""
    if node.op_type in MATRIX_OPERATORS and node.domain in ("", "com.microsoft"):
        return "linear", 1, 2
    if node.op_type == "Conv" and not node.domain:
        return "conv", 1, None
    if node.op_type == "Gather" and not node.domain and _attribute(node, "axis", 0) == 0:
        return "embedding", 0, 2
    return None, 0, None


def _constant(value: ir.Value | None) -> tuple[ir.Value | None, bool, bool]:
    """Return (initializer behind `value` or None, whether it is turned, whether adapters replace it)."""
    turned = replaced = False
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "Transpose" and list(_attribute(producer, "perm", [1, 0])) == [1, 0]:
            turned = not turned
        elif producer.op_type == PARAMETER_SITE and producer.domain == MARKER_DOMAIN:
            replaced = True
        elif producer.op_type != "Identity":
            return None, False, False
        value = producer.inputs[0]
    if value is None or not value.is_initializer() or (value.is_graph_input() and not replaced):
        return None, False, False
    marked = any(user.op_type == PARAMETER_SITE and user.domain == MARKER_DOMAIN for user in value.consumers())
    return value, turned, replaced or marked


def _refusal(node: ir.Node, kind: str, initializer: ir.Value) -> str | None:
    assert initializer.const_value is not None
    elements = int(np.prod(initializer.const_value.shape.numpy()))
    if elements < SMALLEST_ELEMENTS:
        return f"fewer than {SMALLEST_ELEMENTS} elements"
    if kind == "linear":
        for name, expected in (("alpha", 1.0), ("beta", 1.0), ("transA", 0), ("transBatchA", 0), ("transBatchB", 0)):
            if _attribute(node, name, expected) != expected:
                return f"{node.op_type} with {name} {_attribute(node, name, expected):g}"
    if kind == "conv" and _attribute(node, "group", 1) > 1 and initializer.const_value.shape[1] == 1:
        return "depthwise convolution"
    return None


def _site(value: ir.Value) -> str | None:
    """Return the path of the marker that `value` reaches, or None."""
    for reached in _walk(value, _TO_SITE):
        for user, index in reached.uses():
            if user.op_type == ADAPTER_SITE and user.domain == MARKER_DOMAIN and index == 1:
                return str(_attribute(user, "site", ""))
    return None


def _is_output(value: ir.Value) -> bool:
    return any(reached.is_graph_output() for reached in _walk(value, _TO_OUTPUT))


def _is_tied(initializer: ir.Value) -> bool:
    return any(user.op_type == "Gather" and index == 0 for user, index in initializer.uses())


def _walk(value: ir.Value, through: tuple[str, ...]) -> Iterator[ir.Value]:
    """Yield `value` and what becomes of it while nothing but constants is mixed in."""
    waiting = [value]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        for user, index in current.uses():
            if user.op_type not in through or (user.op_type == ADAPTER_SITE and index != 1):
                continue
            if user.op_type == "Reshape" and index != 0:
                continue
            others = [x for i, x in enumerate(user.inputs) if i != index and x is not None]
            mixes = user.op_type in ("Add", "Mul", "Div")
            if not mixes or all(_is_constant(x) for x in others):
                waiting.append(user.outputs[0])


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is not None:
        return producer.op_type in ("Constant", PARAMETER_SITE)
    return value.is_initializer()


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value
