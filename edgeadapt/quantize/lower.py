"""Markers to nodes: the last rewrite of a graph, after which it is plain ONNX.

At a site that adapters use the cheapest branch for what they use there is written, its tensors as optional inputs whose
defaults are the identity; everywhere else the marker goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.errors import ExportError
from edgeadapt.export.graph import ADAPTER_SITE, MARKER_DOMAIN, PARAMETER_SITE
from edgeadapt.quantize.bottleneck import Bottlenecks
from edgeadapt.quantize.branches import Branches
from edgeadapt.quantize.join import joined_name, sites_of
from edgeadapt.slots import ROWWISE_TYPES, BottleneckKind, BranchKind


@dataclass(frozen=True)
class Lowered:
    """What became optional inputs of one graph.

    terms: per module the terms that it takes (names of `SiteUpdate`); modules of a joined product take the same
    joined: the modules of each joined product that takes adapters, in the order of their outputs
    parameters: names of the parameters that can be replaced
    bottlenecks, branches: per module the kinds of bottleneck, and of other networks, that can be beside it
    """

    terms: Mapping[str, frozenset[str]]
    joined: tuple[tuple[str, ...], ...]
    parameters: tuple[str, ...]
    bottlenecks: Mapping[str, frozenset[BottleneckKind]] = field(default_factory=dict)
    branches: Mapping[str, frozenset[BranchKind]] = field(default_factory=dict)


def lower(
    model: ir.Model,
    wanted: Mapping[str, frozenset[str]],
    replaced: set[str],
    flexible: set[str],
    modules: Mapping[str, TargetModule],
    *,
    bottlenecks: Mapping[str, frozenset[BottleneckKind]] | None = None,
    branches: Mapping[str, frozenset[BranchKind]] | None = None,
) -> Lowered:
    """Replace every marker of `model` in place; return what became inputs.

    Args:
        model: one graph with markers.
        wanted: the terms that adapters use (names of `SiteUpdate`), per site; empty for the plain graph.
        replaced: parameters that adapters replace whole.
        flexible: those of them whose axis 0 may differ between adapters.
        modules: the base's modules by path.
        bottlenecks: the kinds of bottleneck that adapters have beside a module, per site.
        branches: the kinds of other networks that they have there.

    Raises:
        ExportError: if there is no place for a bottleneck or a branch in the graph, or no product whose input an
            adapter could scale.
    """
    graph = model.graph
    lowering = _Lowering(graph)
    beside = Bottlenecks(bottlenecks or {}, lowering.add_input)
    further = Branches(branches or {}, lowering.add_input)
    for node in list(graph):
        if node.domain != MARKER_DOMAIN:
            continue
        if node.op_type == PARAMETER_SITE:
            name = node.attributes["parameter"].as_string()
            result = lowering.parameter(node, name, name in flexible) if name in replaced else _given(node, 0)
        elif node.op_type == ADAPTER_SITE:
            sites = sites_of(node)
            terms = frozenset[str]().union(*(wanted.get(site, frozenset()) for site in sites))
            varies = f"{sites[0]}.weight" in flexible & replaced
            result = lowering.site(node, sites, terms, modules, varies=varies) if terms else _given(node, 1)
            result = beside.add(graph, node, sites, result, modules)
            result = further.add(graph, node, sites, result, modules)
            further.note(sites, result)
        else:
            raise ExportError(f"unknown marker {node.op_type}", hint="this is a bug; please report it")
        _replace(graph, node, result)
    model.opset_imports.pop(MARKER_DOMAIN, None)
    _drop_unused(graph)
    if beside.found or further.found:
        graph.sort()  # what a bottleneck reads beside its module's output may have been computed after it
    if lowering.terms or lowering.parameters or beside.found or further.found:
        _forget_shapes(graph, flexible & set(lowering.parameters))
    return Lowered(lowering.terms, tuple(lowering.joined), tuple(lowering.parameters), beside.found, further.found)


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # a marker has all its inputs
    return value


def _replace(graph: ir.Graph, node: ir.Node, result: ir.Value) -> None:
    output = node.outputs[0]
    if output.is_graph_output():
        # A graph output keeps its name: let the producer write it, or an Identity where the value is an input.
        name = output.name
        output.name = None
        if result.producer() is None or result.is_graph_output():
            identity = ir.node("Identity", [result])
            graph.insert_before(node, identity)
            result = identity.outputs[0]
        result.name = name
        result.shape, result.type = output.shape, output.type
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


class _Lowering:
    """Adds the inputs and nodes of one slots graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.sites: dict[str, dict[str, ir.Value]] = {}
        self.terms: dict[str, frozenset[str]] = {}
        self.joined: dict[tuple[str, ...], None] = {}
        self.parameters: dict[str, ir.Value] = {}

    def parameter(self, node: ir.Node, name: str, flexible: bool) -> ir.Value:
        """Return the optional input that stands for parameter `name`, its default the base's value."""
        if name not in self.parameters:
            source = node.inputs[0]
            assert source is not None
            assert source.const_value is not None
            value = np.asarray(source.const_value.numpy())
            shape: list[int | str] = list(value.shape)
            if flexible:
                shape[0] = f"{name}.num_labels"
            if source.name == name:
                source.name = f"{name}.base"
            self.parameters[name] = self.add_input(name, value, shape)
        return self.parameters[name]

    def site(
        self,
        node: ir.Node,
        sites: tuple[str, ...],
        terms: frozenset[str],
        modules: Mapping[str, TargetModule],
        *,
        varies: bool,
    ) -> ir.Value:
        """Return y' as `SiteUpdate` has it for the terms in use; one branch for all `sites` of a product.

        Where the number of outputs `varies` (a head that another adapter replaces), the defaults have one output, which
        stands for any number.
        """
        self.terms |= dict.fromkeys(sites, terms)
        module = modules[sites[0]]
        if len(sites) > 1:
            self.joined[sites] = None
            width = sum(modules[site].out_features for site in sites)
            module = replace(module, path=joined_name(sites), out_features=width)
        site = module.path
        inputs = self.sites.setdefault(site, {})
        x, y = _given(node, 0), _given(node, 1)
        # a first axis of the tensors meets the rows only in [batch, seq, out], not in a norm of heads apart
        shape = node.outputs[0].shape
        rowwise = module.type in ROWWISE_TYPES and shape is not None and len(shape) == 3
        nodes: list[ir.Node] = []
        if "input_gain" in terms:
            size = module.in_features
            vector = self._vector(site, "input_gain", np.ones(size, np.float32), None if rowwise else [size])
            y = _of_scaled(nodes, y, x, _append(nodes, "Mul", [x, vector]), site)
        if "a" in terms:
            a, b = self._low_rank_inputs(site, module, inputs, varies=varies, rowwise=rowwise)
            nodes += _low_rank(x, a, b, module, _conv_of(node, module))
            y = _append(nodes, "Add", [y, nodes[-1].outputs[0]])
        for term, op, default in (("gain", "Mul", np.ones), ("offset", "Add", np.zeros)):
            if term in terms:
                size, axis = (1, f"{site}.out") if varies else (module.out_features, module.out_features)
                vector = self._vector(site, term, default(size, np.float32), None if rowwise else [axis])
                y = _append(nodes, op, [y, _per_channel(nodes, vector, module)])
        self.graph.insert_before(node, nodes)
        return y

    def _vector(
        self, site: str, term: str, default: np.ndarray[Any, Any], declared: Sequence[int | str] | None
    ) -> ir.Value:
        """Return the input of a term with one axis."""
        inputs = self.sites[site]
        if term not in inputs:
            inputs[term] = self.add_input(f"{site}.{term}", default, declared)
        return inputs[term]

    def _low_rank_inputs(
        self, site: str, module: TargetModule, inputs: dict[str, ir.Value], *, varies: bool, rowwise: bool
    ) -> tuple[ir.Value, ir.Value]:
        if "a" not in inputs:
            sizes = {"rank": 0, "out": 1 if varies else module.out_features}
            axes = {"rank": f"{site}.rank", "out": f"{site}.out" if varies else module.out_features}
            for term, name, shape in zip("ab", ("lora_A", "lora_B"), _low_rank_shapes(module), strict=True):
                default = np.zeros([sizes[d] if isinstance(d, str) else d for d in shape], np.float32)
                declared = [axes[d] if isinstance(d, str) else d for d in shape]
                inputs[term] = self.add_input(f"{site}.{name}", default, None if rowwise else declared)
        return inputs["a"], inputs["b"]

    def add_input(self, name: str, default: np.ndarray[Any, Any], shape: Sequence[int | str] | None) -> ir.Value:
        """Add an optional input. Without a declared shape it may get a first axis: one adapter for each row."""
        declared = None if shape is None else ir.Shape(shape)
        value = ir.Value(name=name, shape=declared, type=ir.TensorType(ir.DataType.FLOAT))
        value.const_value = ir.tensor(np.ascontiguousarray(default, np.float32), name=name)
        self.graph.inputs.append(value)
        self.graph.register_initializer(value)
        return value


_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")
_AROUND_A_PRODUCT = ("Add", "Reshape", "Identity")


def _of_scaled(nodes: list[ir.Node], y: ir.Value, x: ir.Value, scaled: ir.Value, site: str) -> ir.Value:
    """Return what the module `site` gives for `scaled` in place of its input `x`; its nodes, made again, go to `nodes`.

    The first ones are what others may still read; `_drop_unused` takes them where nothing does.
    """
    copies: list[ir.Node] = []
    result = _again(y, x, scaled, copies)
    if result is None or all(node.op_type not in _PRODUCTS for node in copies):
        raise ExportError(
            f"an adapter scales the input of {site}, but the graph has no product between that and its output",
            hint="export with --merge, and report the architecture",
        )
    nodes += copies
    return result


def _again(value: ir.Value | None, x: ir.Value, scaled: ir.Value, copies: list[ir.Node]) -> ir.Value | None:
    """Return a module's `value` computed from `scaled` in place of `x`, None if it is not computed from `x`."""
    if value is x:
        return scaled
    node = None if value is None else value.producer()
    if node is None or node.op_type not in (*_PRODUCTS, *_AROUND_A_PRODUCT):
        return None
    data = len(node.inputs) if node.op_type == "Add" else 1
    new = [_again(given, x, scaled, copies) for given in node.inputs[:data]]
    if all(given is None for given in new):
        return None
    inputs = [old if given is None else given for given, old in zip(new, node.inputs, strict=False)]
    copies.append(ir.Node(node.domain, node.op_type, [*inputs, *node.inputs[data:]], node.attributes.values()))
    return copies[-1].outputs[0]


def _low_rank_shapes(module: TargetModule) -> tuple[list[int | str], list[int | str]]:
    """Return the shapes of A and B with "rank" and "out" for those sizes."""
    if module.type == "conv2d":
        return ["rank", module.in_features, *module.weight_shape[2:]], ["out", "rank", 1, 1]
    return [module.in_features, "rank"], ["rank", "out"]


def _append(nodes: list[ir.Node], op: str, inputs: list[ir.Value | None], **attributes: Any) -> ir.Value:
    node = ir.node(op, inputs, attributes=attributes)
    nodes.append(node)
    return node.outputs[0]


def _conv_of(node: ir.Node, module: TargetModule) -> ir.Node | None:
    """Return the Conv node whose output the marker `node` passes, or None if `module` is no convolution."""
    if module.type != "conv2d":
        return None
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type != "Conv":
        producer = producer.inputs[0].producer() if producer.inputs and producer.inputs[0] is not None else None
    if producer is None:
        raise ExportError(f"no Conv found for {module.path}", hint="this is a bug; please report it")
    return producer


def _low_rank(
    x: ir.Value | None, a: ir.Value, b: ir.Value, module: TargetModule, conv: ir.Node | None
) -> list[ir.Node]:
    nodes: list[ir.Node] = []
    if module.type == "embedding":
        narrow = _append(nodes, "Gather", [a, x], axis=0)
        _append(nodes, "MatMul", [narrow, b])
    elif conv is not None:
        # peft: A takes the base's stride and padding, never its dilation or groups; a grouped B comes here as dense.
        same = [attribute for name, attribute in conv.attributes.items() if name in ("pads", "strides")]
        narrow_node = ir.Node("", "Conv", [conv.inputs[0], a], attributes=same)
        nodes.append(narrow_node)
        _append(nodes, "Conv", [narrow_node.outputs[0], b])
    else:
        narrow = _append(nodes, "MatMul", [x, a])
        _append(nodes, "MatMul", [narrow, b])
    return nodes


def _per_channel(nodes: list[ir.Node], vector: ir.Value, module: TargetModule) -> ir.Value:
    """Return `vector` shaped for the channel axis: last for most modules, axis 1 for images."""
    if module.type != "conv2d" and module.class_name != "BatchNorm2d":
        return vector
    shape = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([-1, 1, 1], np.int64))})
    nodes.append(shape)
    return _append(nodes, "Reshape", [vector, shape.outputs[0]])


def _drop_unused(graph: ir.Graph) -> None:
    """Remove nodes and constants that nothing reads: what the rewrites left of shape arithmetic, above all."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_input():
            del graph.initializers[name]


def _forget_shapes(graph: ir.Graph, flexible: set[str]) -> None:
    """Drop inferred shapes: a head of another class count changes them. Outputs keep their rank, class axes vary."""
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    if not flexible:
        return
    for value in graph.outputs:
        if value.name == "logits" and value.shape is not None:
            value.shape = ir.Shape([*list(value.shape)[:-1], "num_labels"])
