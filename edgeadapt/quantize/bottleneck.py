"""A bottleneck beside a module: the nodes of y' = y + f(n(v) down + down_bias) up + up_bias, or of a fusion of some.

What it reads is found in the graph: behind the marker of a module lies the sum with the residual, which the fusion of
norms may have put into one node. So no model has to be traced in another way, and the plain graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.errors import ExportError
from edgeadapt.slots import BottleneckKind

AddInput = Callable[[str, Any, Sequence[int | str]], ir.Value]

_SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_EPSILON = 1e-5  # torch.nn.LayerNorm's
_LEAK = 0.01  # torch.nn.functional.leaky_relu's
_QUICK = 1.702


class Bottlenecks:
    """Adds the bottlenecks of one slots graph.

    found: the kinds at each module that has any
    """

    def __init__(self, wanted: Mapping[str, frozenset[BottleneckKind]], add_input: AddInput) -> None:
        self._wanted = wanted
        self._add_input = add_input
        self._inputs: dict[str, tuple[ir.Value, ...]] = {}
        self.found: dict[str, frozenset[BottleneckKind]] = {}

    def add(
        self,
        graph: ir.Graph,
        marker: ir.Node,
        sites: tuple[str, ...],
        y: ir.Value,
        modules: Mapping[str, TargetModule],
    ) -> ir.Value:
        """Return `y`, what lies behind `marker` so far, with all bottlenecks of its module added.

        Those of one stage read the same y.

        Raises:
            ExportError: if the graph lacks what a bottleneck reads.
        """
        site = next((site for site in sites if site in self._wanted), None)
        if site is None:
            return y
        if len(sites) > 1:
            raise ExportError(
                f"module {site} is computed together with {', '.join(other for other in sites if other != site)}, and "
                "an adapter has a bottleneck there alone",
                hint="export with --quantize fp16 or none, which join no products",
            )
        self.found[site] = self._wanted[site]
        nodes: list[ir.Node] = []
        for stage in sorted({kind.stage for kind in self._wanted[site]}):
            result = y
            for kind in sorted(kind for kind in self._wanted[site] if kind.stage == stage):
                v = read_beside(nodes, marker, y, kind.reads, site)
                added = self._branch(nodes, v, kind, site, modules[site].out_features)
                result = _append(nodes, "Add", [result, added])
            y = result
        graph.insert_before(marker, nodes)
        return y

    def _branch(self, nodes: list[ir.Node], v: ir.Value, kind: BottleneckKind, site: str, features: int) -> ir.Value:
        down, down_bias, up, up_bias, *keys = self._terms(kind, site, features)
        query = v
        if kind.normalized:
            ones, zeros = (_constant(nodes, make(features, np.float32)) for make in (np.ones, np.zeros))
            v = _append(nodes, "LayerNormalization", [v, ones, zeros], axis=-1, epsilon=_EPSILON)
        if kind.fused:
            v = _append(nodes, "Unsqueeze", [v, _integers(nodes, 1)])
        narrow = _append(nodes, "Add", [_append(nodes, "MatMul", [v, down]), down_bias])
        narrow = activate(nodes, narrow, kind.activation)
        wide = _append(nodes, "Add", [_append(nodes, "MatMul", [narrow, up]), up_bias])
        return _attend(nodes, query, narrow, wide, keys) if kind.fused else wide

    def _terms(self, kind: BottleneckKind, site: str, features: int) -> tuple[ir.Value, ...]:
        """Return its optional inputs; a width of 0 is the identity."""
        prefix = kind.prefix(site)
        if prefix not in self._inputs:
            sizes = {"width": 0, "parts": 1}
            self._inputs[prefix] = tuple(
                self._add_input(
                    f"{prefix}.{term}",
                    np.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in shape], np.float32),
                    [f"{prefix}.{axis}" if isinstance(axis, str) else axis for axis in shape],
                )
                for term, shape in zip(kind.terms, _shapes(kind, features), strict=True)
            )
        return self._inputs[prefix]


def _shapes(kind: BottleneckKind, features: int) -> list[list[int | str]]:
    """Return the shapes of its terms with "width" and "parts" for those sizes."""
    if not kind.fused:
        return [[features, "width"], ["width"], ["width", features], [features]]
    narrow: list[list[int | str]] = [["parts", features, "width"], ["parts", 1, "width"]]
    wide: list[list[int | str]] = []
    for size in (features, features + 1):
        wide += [["parts", "width", size], ["parts", 1, size]]
    return narrow + wide


def _attend(
    nodes: list[ir.Node], query: ir.Value, narrow: ir.Value, wide: ir.Value, keys: Sequence[ir.Value]
) -> ir.Value:
    """Return [batch, seq, features]: the parts' outputs [batch, n, seq, features], weighted by how they fit the query.

    The query's own product and bias are in the keys, so it comes with a 1 behind it.
    """
    found = _append(nodes, "Add", [_append(nodes, "MatMul", [narrow, keys[0]]), keys[1]])
    one = _constant(nodes, np.float32(1.0))
    query = _append(nodes, "Pad", [query, _integers(nodes, 0, 1), one, _integers(nodes, -1)], mode="constant")
    query = _append(nodes, "Unsqueeze", [query, _integers(nodes, 1)])
    scores = _append(nodes, "ReduceSum", [_append(nodes, "Mul", [query, found]), _integers(nodes, -1)], keepdims=1)
    weights = _append(nodes, "Softmax", [scores], axis=1)
    return _append(nodes, "ReduceSum", [_append(nodes, "Mul", [weights, wide]), _integers(nodes, 1)], keepdims=0)


def _integers(nodes: list[ir.Node], *values: int) -> ir.Value:
    return _append(nodes, "Constant", [], value=ir.tensor(np.array(values, np.int64)))


def read_beside(nodes: list[ir.Node], marker: ir.Node, y: ir.Value, reads: str, site: str) -> ir.Value:
    """Return what a network beside a module reads: its output, the residual, their sum, or its norm."""
    if reads == "output":
        return y
    node, residual = _sum_behind(marker.outputs[0], site)
    if reads == "residual":
        return residual
    if reads == "norm" and node.op_type in _SKIPS:
        return _copy(nodes, node, [y, residual, *node.inputs[2:]])
    total = _append(nodes, "Add", [y, residual])
    if reads == "sum":
        return total
    norms = [user for user, _ in node.outputs[0].uses() if user.op_type in _NORMS]
    if len(norms) != 1:
        raise _no_place(site, "a norm of its sum with the residual")
    return _copy(nodes, norms[0], [total, *norms[0].inputs[1:]])


def _sum_behind(output: ir.Value, site: str) -> tuple[ir.Node, ir.Value]:
    """Return the node that adds the residual to a module's output, and the residual."""
    users = [user for user, _ in output.uses()]
    if len(users) != 1 or users[0].op_type not in ("Add", *_SKIPS):
        raise _no_place(site, "a residual that is added to its output next")
    node = users[0]
    residual = node.inputs[1] if node.inputs[0] is output else node.inputs[0]
    biased = node.op_type in _SKIPS and len(node.inputs) > (4 if node.op_type == _SKIPS[0] else 3)
    if residual is None or residual.const_value is not None or biased:
        raise _no_place(site, "a residual that is added to its output next")
    return node, residual


def _no_place(site: str, what: str) -> ExportError:
    return ExportError(
        f"the graph has not {what} at module {site}, where an adapter has a bottleneck that reads it",
        hint="this architecture is not supported yet for adapters of this kind",
    )


def _copy(nodes: list[ir.Node], node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
    """Return the first output of a copy of `node` on other inputs."""
    copied = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=1)
    nodes.append(copied)
    return copied.outputs[0]


def activate(nodes: list[ir.Node], x: ir.Value, activation: str) -> ir.Value:
    """Draw an activation by its name (`BOTTLENECK_ACTIVATIONS`)."""
    if activation == "linear":
        return x
    if activation in ("silu", "quick_gelu"):
        scaled = x if activation == "silu" else _append(nodes, "Mul", [x, _constant(nodes, np.float32(_QUICK))])
        return _append(nodes, "Mul", [x, _append(nodes, "Sigmoid", [scaled])])
    if activation in ("gelu", "gelu_tanh"):
        return _append(nodes, "Gelu", [x], approximate="none" if activation == "gelu" else "tanh")
    if activation == "leaky_relu":
        return _append(nodes, "LeakyRelu", [x], alpha=_LEAK)
    return _append(nodes, {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[activation], [x])


def _constant(nodes: list[ir.Node], value: Any) -> ir.Value:
    return _append(nodes, "Constant", [], value=ir.tensor(np.asarray(value, np.float32)))


def _append(nodes: list[ir.Node], op: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
    node = ir.node(op, inputs, attributes=attributes)
    nodes.append(node)
    return node.outputs[0]
