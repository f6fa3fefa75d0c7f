"""A graph of a few equal layers made one of many: the last layer's nodes are written again for each further layer.

What belongs to a layer is told by the markers: the nodes that its markers and outputs need, and that no earlier layer
needs. So a residual Add that was fused with the next layer's norm belongs to that next layer, in every layer alike.
The nodes of layers 1 and 2 are compared one by one, which also gives the rule by which one layer follows from the one
before; where they differ in anything but that rule, nothing is stamped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgeadapt.export.graph import ADAPTER_SITE
from edgeadapt.export.repeats import TRACED, Repeat, layer_of
from edgeadapt.export.trace import Trace

PATTERN, COPY = TRACED - 2, TRACED - 1


class _DifferError(Exception):
    """The layers are not equal in the graph."""


def stamp(model: ir.Model, repeat: Repeat, trace: Trace, module: torch.nn.Module, stand_ins: Mapping[int, str]) -> bool:
    """Add the layers that were not traced to `model`, in place; return whether that could be done.

    Args:
        model: the graph of the first `TRACED` layers, fused, with markers.
        repeat: the stack of layers.
        trace: of the whole model: the names of all inputs and outputs in their order.
        module: the base's module, for the weights; they are not copied.
        stand_ins: the names of the weights of which the graph holds others, by the others' addresses.
    """
    graph = model.graph
    try:
        parts = _parts(graph, repeat.path)
        rule = _Rule(_Memory(module, repeat.path, stand_ins))
        rule.learn(parts)
        _check_rest(parts)
    except _DifferError:
        return False
    stamper = _Stamper(graph, rule, parts)
    for layer in range(TRACED, repeat.count):
        stamper.add(layer)
    rule.memory.put_weights(graph)
    stamper.finish(trace)
    return True


def _parts(graph: ir.Graph, path: str) -> list[list[ir.Node]]:
    """Return the nodes of every traced layer, in the graph's order.

    Raises:
        _DifferError: if a node has a graph of its own, or a layer has no node.
    """
    owner: dict[ir.Node, int] = {}
    for layer in range(TRACED):
        waiting = [node for node in graph if _is_root(node, path, layer)]
        while waiting:
            node = waiting.pop()
            if node in owner:
                continue
            owner[node] = layer
            makers = [value.producer() for value in node.inputs if value is not None]
            waiting += [maker for maker in makers if maker is not None]
    parts: list[list[ir.Node]] = [[] for _ in range(TRACED)]
    for node in graph:
        if node in owner:
            parts[owner[node]].append(node)
    if not all(parts) or any(a.type in _GRAPHS for part in parts[1:] for n in part for a in n.attributes.values()):
        raise _DifferError
    return parts


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _is_root(node: ir.Node, path: str, layer: int) -> bool:
    if node.op_type == ADAPTER_SITE:
        return node.attributes["site"].as_string().startswith(f"{path}.{layer}.")
    return any(layer_of(value.name or "") == layer for value in node.outputs if value.is_graph_output())


def _check_rest(parts: Sequence[Sequence[ir.Node]]) -> None:
    """Refuse a graph in which anything but the next layer reads layer `PATTERN`."""
    allowed = {*parts[PATTERN], *parts[COPY]}
    for node in parts[PATTERN]:
        for value in node.outputs:
            _require(all(user in allowed for user in value.consumers()))
            _require(not value.is_graph_output() or layer_of(str(value.name)) == PATTERN)


class _Memory:
    """The layers' weights by their place in memory: a constant of the graph may be a transposed view of one."""

    def __init__(self, module: torch.nn.Module, path: str, stand_ins: Mapping[int, str]) -> None:
        self.path = path
        self.names = stand_ins
        self.tensors = {
            name: tensor
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if name.startswith(f"{path}.")
        }

    def name(self, array: NDArray[Any]) -> str | None:
        """Return the weight that `array` stands for, or for a view of it; None if for none."""
        return self.names.get(array.__array_interface__["data"][0])

    def view(self, name: str, like: NDArray[Any]) -> NDArray[Any]:
        """Return the view of tensor `name` that has the shape and strides of `like`."""
        whole = self.tensors[name].detach().numpy()
        return np.lib.stride_tricks.as_strided(whole, like.shape, like.strides, writeable=False)

    def put_weights(self, graph: ir.Graph) -> None:
        """Give every constant of `graph` that stands for a weight that weight's values."""
        for value in graph.initializers.values():
            assert value.const_value is not None
            stand_in = value.const_value.numpy()
            name = self.name(stand_in)
            if name is not None:
                value.const_value = ir.Tensor(self.view(name, stand_in), dtype=value.const_value.dtype, name=value.name)

    def at(self, name: str, layer: int, other: int) -> str:
        """Return the name of the tensor of layer `other` that is `name` in `layer`."""
        return name.replace(f"{self.path}.{layer}.", f"{self.path}.{other}.", 1)


@dataclass
class _Rule:
    """How layer `COPY` follows from layer `PATTERN`.

    made: value of the pattern to the copy's value in its place
    handed: value of the layer before the pattern to the pattern's value in its place, where the next layer reads them
    weights: constants of the copy that are weights of the layer, by value to tensor name
    inputs: graph inputs of the copy that belong to its layer
    """

    memory: _Memory
    made: dict[ir.Value, ir.Value] = field(default_factory=dict)
    handed: dict[ir.Value, ir.Value] = field(default_factory=dict)
    weights: dict[ir.Value, str] = field(default_factory=dict)
    inputs: set[ir.Value] = field(default_factory=set)

    def learn(self, parts: Sequence[Sequence[ir.Node]]) -> None:
        """Compare the two layers node by node.

        Raises:
            _DifferError: at the first difference.
        """
        pattern = set(parts[PATTERN])
        _require(len(parts[PATTERN]) == len(parts[COPY]))
        for one, other in zip(parts[PATTERN], parts[COPY], strict=True):
            _require(one.op_identifier() == other.op_identifier() and one.version == other.version)
            _require(len(one.inputs) == len(other.inputs) and len(one.outputs) == len(other.outputs))
            self._attributes(one, other)
            for a, b in zip(one.inputs, other.inputs, strict=True):
                self._input(a, b, pattern)
            self.made.update(zip(one.outputs, other.outputs, strict=True))

    def _attributes(self, one: ir.Node, other: ir.Node) -> None:
        _require(one.attributes.keys() == other.attributes.keys())
        for name, attribute in one.attributes.items():
            mine, its = attribute.value, other.attributes[name].value
            if attribute.type == ir.AttributeType.STRING and name == "site":
                _require(self.memory.at(mine, PATTERN, COPY) == its)
            elif attribute.type == ir.AttributeType.TENSOR:
                _require(_equal(mine, its))
            else:
                _require(attribute.type == other.attributes[name].type and mine == its)

    def _input(self, a: ir.Value | None, b: ir.Value | None, pattern: set[ir.Node]) -> None:
        if a is None or b is None:
            _require(a is b)
            return
        mine, its = a.producer(), b.producer()
        if mine is not None and mine in pattern:
            _require(self.made.get(a) is b)
        elif its is not None and its in pattern:
            # What comes to layer 1 from before (of layer 0, or an input of the model) comes to layer 2 from layer 1.
            _require(self.handed.setdefault(a, b) is b)
        elif mine is None and its is None and a is not b:
            self._constant(a, b)
        else:
            _require(a is b)

    def _constant(self, a: ir.Value, b: ir.Value) -> None:
        if a.is_graph_input() or b.is_graph_input():
            layer = layer_of(a.name or "")
            _require(layer == PATTERN and (a.name or "").replace(f".{PATTERN}.", f".{COPY}.", 1) == b.name)
            self.inputs.add(b)
            return
        _require(a.const_value is not None and b.const_value is not None)
        assert a.const_value is not None
        assert b.const_value is not None
        mine, its = a.const_value.numpy(), b.const_value.numpy()
        name, its_name = self.memory.name(mine), self.memory.name(its)
        if name is None or its_name is None:
            _require(name is its_name and _equal(a.const_value, b.const_value))
            return
        same = (mine.shape, mine.strides, mine.dtype) == (its.shape, its.strides, its.dtype)
        _require(same and self.memory.at(name, PATTERN, COPY) == its_name)
        self.weights[b] = its_name


def _require(holds: bool) -> None:
    if not holds:
        raise _DifferError


def _equal(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


class _Stamper:
    """Writes further layers behind the last one."""

    def __init__(self, graph: ir.Graph, rule: _Rule, parts: Sequence[Sequence[ir.Node]]) -> None:
        self.graph, self.rule = graph, rule
        self.nodes = parts[COPY]
        self.rest = set(graph).difference(*parts)
        self.last = self.nodes[-1]
        self.inputs = {str(value.name): value for value in graph.inputs}
        self.outputs = {str(value.name): value for value in graph.outputs}
        self.constants: dict[int, dict[ir.Value, ir.Value]] = {}
        # The values of the layer before, by the copy's values in their places.
        self.values = {value: value for node in self.nodes for value in node.outputs}

    def add(self, layer: int) -> None:
        """Write the nodes of `layer`."""
        made: dict[ir.Value, ir.Value] = {}
        nodes = [self._node(node, layer, made) for node in self.nodes]
        self.graph.insert_after(self.last, nodes)
        self.last, self.values = nodes[-1], made

    def _node(self, node: ir.Node, layer: int, made: dict[ir.Value, ir.Value]) -> ir.Node:
        attributes = [
            ir.AttrString(a.name, self.rule.memory.at(a.value, COPY, layer)) if a.name == "site" else a
            for a in node.attributes.values()
        ]
        inputs = [None if value is None else self._input(value, layer, made) for value in node.inputs]
        new = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            attributes,
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
        )
        for old, value in zip(node.outputs, new.outputs, strict=True):
            value.shape, value.type = None if old.shape is None else ir.Shape(old.shape), old.type
            if old.is_graph_output() and layer_of(str(old.name)) == COPY:
                value.name = str(old.name).replace(f".{COPY}.", f".{layer}.", 1)
                self.outputs[value.name] = value
            made[old] = value
        return new

    def _input(self, value: ir.Value, layer: int, made: Mapping[ir.Value, ir.Value]) -> ir.Value:
        """Return what `layer` reads where layer `COPY` reads `value`."""
        if value in made:
            return made[value]
        if value in self.rule.made:
            return self.values[self.rule.made[value]]
        if value in self.rule.inputs:
            return self._layer_input(value, layer)
        if value in self.rule.weights:
            constants = self.constants.setdefault(layer, {})
            if value not in constants:
                constants[value] = self._weight(value, layer)
            return constants[value]
        return value

    def _layer_input(self, value: ir.Value, layer: int) -> ir.Value:
        name = str(value.name).replace(f".{COPY}.", f".{layer}.", 1)
        if name not in self.inputs:
            self.inputs[name] = ir.Value(name=name, shape=value.shape, type=value.type)
        return self.inputs[name]

    def _weight(self, value: ir.Value, layer: int) -> ir.Value:
        assert value.const_value is not None
        memory = self.rule.memory
        like, own = value.const_value.numpy(), memory.at(self.rule.weights[value], COPY, layer)
        name = memory.at(str(value.name), COPY, layer)
        if name == value.name:
            name = f"{own}.{value.name}"
        tensor = ir.Tensor(memory.view(own, like), dtype=value.const_value.dtype, name=name)
        return ir.Value(name=name, shape=value.shape, type=value.type, const_value=tensor)

    def finish(self, trace: Trace) -> None:
        """Have the rest of the graph read the last layer, and put inputs, outputs and constants in their order."""
        for old, new in self.values.items():
            for user, index in list(old.uses()):
                if user in self.rest:
                    user.replace_input_with(index, new)
            if old.is_graph_output() and layer_of(str(old.name)) is None:
                name, old.name = str(old.name), None
                new.name, self.outputs[name] = name, new
        self.graph.inputs[:] = [self.inputs[name] for name in trace.inputs]
        self.graph.outputs[:] = [self.outputs[name] for name in trace.outputs or self.outputs]
        self._order_constants()
        self.graph.sort()

    def _order_constants(self) -> None:
        """Register the new layers' weights behind those of the layer that they were copied from, layer by layer."""
        initializers = self.graph.initializers
        before = list(initializers.values())
        initializers.clear()
        run: list[ir.Value] = []
        for value in before:
            if value not in self.rule.weights:
                self._register_copies(run)
                run = []
            else:
                run.append(value)
            initializers[str(value.name)] = value
        self._register_copies(run)

    def _register_copies(self, run: Sequence[ir.Value]) -> None:
        for constants in self.constants.values():
            for value in run:
                self.graph.register_initializer(constants[value])
