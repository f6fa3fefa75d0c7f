"""A bottleneck beside a module: the nodes of y' = y + f(n(v) down + down_bias) up + up_bias.

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
        """Return `y`, what lies behind `marker` so far, with all bottlenecks of its module added; each reads y itself.

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
        result = y
        for kind in sorted(self._wanted[site]):
            v = _read(nodes, marker, y, kind.reads, site)
            added = self._branch(nodes, v, kind, site, modules[site].out_features)
            result = _append(nodes, "Add", [result, added])
        graph.insert_before(marker, nodes)
        return result

    def _branch(self, nodes: list[ir.Node], v: ir.Value, kind: BottleneckKind, site: str, features: int) -> ir.Value:
        down, down_bias, up, up_bias = self._terms(kind.prefix(site), features)
        if kind.normalized:
            ones, zeros = (_constant(nodes, make(features, np.float32)) for make in (np.ones, np.zeros))
            v = _append(nodes, "LayerNormalization", [v, ones, zeros], axis=-1, epsilon=_EPSILON)
        narrow = _append(nodes, "Add", [_append(nodes, "MatMul", [v, down]), down_bias])
        narrow = _activate(nodes, narrow, kind.activation)
        return _append(nodes, "Add", [_append(nodes, "MatMul", [narrow, up]), up_bias])

    def _terms(self, prefix: str, features: int) -> tuple[ir.Value, ...]:
        """Return the four optional inputs; a width of 0 is the identity."""
        if prefix not in self._inputs:
            width = f"{prefix}.width"
            shapes: dict[str, tuple[list[int], list[int | str]]] = {
                "down": ([features, 0], [features, width]),
                "down_bias": ([0], [width]),
                "up": ([0, features], [width, features]),
                "up_bias": ([features], [features]),
            }
            self._inputs[prefix] = tuple(
                self._add_input(f"{prefix}.{term}", np.zeros(default, np.float32), declared)
                for term, (default, declared) in shapes.items()
            )
        return self._inputs[prefix]


def _read(nodes: list[ir.Node], marker: ir.Node, y: ir.Value, reads: str, site: str) -> ir.Value:
    """Return what a bottleneck reads."""
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


def _activate(nodes: list[ir.Node], x: ir.Value, activation: str) -> ir.Value:
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
