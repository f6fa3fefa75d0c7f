"""A graph as a torch module that torch.export can trace: fixed shapes, float32, what is constant computed before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import attention, contrib, convolutions, operators
from .graph import ConversionError, Graph, Node, digest_key
from .operator_table import Operator, Tensor, find

Array = NDArray[Any]
LIBRARIES = (operators, convolutions, contrib, attention)
"""The modules that fill the table of operators."""


class Weights:
    """Arrays of all networks of a model; equal ones are one parameter."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], torch.nn.Parameter] = {}
        self._made: dict[tuple[Any, ...], Array] = {}

    def parameter(self, array: Array) -> torch.nn.Parameter:
        """Return the parameter that holds this array."""
        key = digest_key(array)
        if key not in self._held:
            self._held[key] = torch.nn.Parameter(torch.from_numpy(np.array(array)), requires_grad=False)
        return self._held[key]

    def keys(self) -> dict[int, tuple[Any, ...]]:
        """Return what stands for an array's content by the identity of its parameter."""
        return {id(parameter): key for key, parameter in self._held.items()}

    def prepared(self, node: Node, operator: Operator, arrays: Sequence[Array | None]) -> torch.nn.Parameter:
        """Return what an operator makes of its constants, made once of equal ones."""
        key = (operator.prepare, str(node.attributes), *(None if a is None else digest_key(a) for a in arrays))
        if key not in self._made:
            assert operator.prepare is not None
            while arrays and arrays[-1] is None:
                arrays = arrays[:-1]
            self._made[key] = self.parameter(operator.prepare(node, *arrays))  # type: ignore[assignment]
        return self._made[key]  # type: ignore[return-value]


@dataclass(frozen=True)
class Step:
    """One operator of the run: where its inputs come from and go to.

    inputs: ("value", name), ("weight", name of a parameter), ("setting", numbers) or ("none", None)
    """

    node: Node
    compute: Any
    inputs: tuple[tuple[str, Any], ...]
    options: Mapping[str, Any]


class Network(torch.nn.Module):
    """A graph with fixed shapes.

    Args:
        graph: what is computed.
        inputs: an example of every input that is fed, by name, in the order of `forward`'s arguments.
        fixed: values of the other inputs; those that have a default need none.
        weights: where weights are shared with other networks.
        bound: no position of a text is beyond it.
    """

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        weights: Weights,
        *,
        bound: int = 0,
    ) -> None:
        super().__init__()
        missing = set(graph.inputs) - set(inputs) - set(fixed) - set(graph.constants)
        if missing:
            raise ConversionError(
                f"no value for the graph's input {min(missing)!r}", hint="this is a bug; please report it"
            )
        self.input_names = tuple(inputs)
        self.output_names = graph.outputs
        self._steps: list[Step] = []
        self._weights, self._bound = weights, bound
        self._names: dict[int, str] = {}
        arrays = {name: array for name, array in graph.constants.items() if name not in inputs and name not in fixed}
        self._known: dict[str, Tensor] = {}
        self._arrays = arrays
        self._known.update(fixed)
        self._values: dict[str, Tensor] = dict(inputs)
        with torch.no_grad():
            for node in graph.nodes:
                self._plan(node)
        self._outputs = [self._reference(name) for name in graph.outputs]
        self.examples = tuple(self._values[name] for name in self.input_names)
        self._drop_unused()
        for attribute in ("_values", "_arrays", "_known", "_weights"):
            delattr(self, attribute)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in the graph's order."""
        values = dict(zip(self.input_names, inputs, strict=True))
        for step in self._steps:
            found = step.compute(step.node, *(self._take(item, values) for item in step.inputs), **step.options)
            _keep(step.node, found, values)
        return tuple(self._take(item, values) for item in self._outputs)

    def _take(self, reference: tuple[str, Any], values: Mapping[str, Tensor]) -> Any:
        kind, what = reference
        if kind == "value":
            return values[what]
        return getattr(self, what) if kind == "weight" else what

    def _plan(self, node: Node) -> None:
        """Compute what is known of a node now, or make it a step of the run."""
        operator = find(node)
        if node.kind == ("", "Shape") and node.inputs[0] in self._values:
            self._known[node.outputs[0]] = operator.compute(node, self._values[node.inputs[0]])
            return
        given = [name for name in node.inputs if name]
        if all(self._is_known(name) for name in given):
            inputs, options = self._inputs(node, operator)
            _keep(node, operator.compute(node, *(self._now(item) for item in inputs), **options), self._known)
            return
        if self._skip(node) or self._open_ended(node):
            return
        inputs, options = self._inputs(node, operator)
        self._add(node, operator.compute, inputs, options)

    def _add(self, node: Node, compute: Any, inputs: Sequence[tuple[str, Any]], options: Mapping[str, Any]) -> None:
        found = compute(node, *(self._now(item) for item in inputs), **options)
        first = found[0] if isinstance(found, tuple) else found
        if first.numel() and _empty_product(node, [self._now(item) for item in inputs]):
            self._known[node.outputs[0]] = first  # a product over no numbers: zeros
            return
        _keep(node, found, self._values)
        self._steps.append(Step(node, compute, tuple(inputs), options))

    def _inputs(self, node: Node, operator: Operator) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
        names = [name for index, name in enumerate(node.inputs) if name and index in operator.prepared]
        if operator.prepare is None or not names or not all(self._is_known(name) for name in names):
            return [self._input(node, index, operator) for index in range(len(node.inputs))], {}
        arrays = [self._array(node.inputs[i]) if i < len(node.inputs) else None for i in operator.prepared]
        made = ("weight", self._name(self._weights.prepared(node, operator, arrays)))
        rest = [self._input(node, i, operator) for i in range(len(node.inputs)) if i not in operator.prepared]
        place = operator.prepared[0]
        return [*rest[:place], made, *rest[place:]], {"prepared": True}

    def _input(self, node: Node, index: int, operator: Operator) -> tuple[str, Any]:
        name = node.inputs[index]
        if not name:
            return "none", None
        if index in operator.settings:
            if not self._is_known(name):
                raise ConversionError(
                    f"{node.label} (node {node.name!r}): its input {name!r} decides about shapes "
                    "and is known only in a run",
                    hint="profile this bundle with a runtime that reads ONNX (onnxruntime, openvino)",
                )
            return "setting", self._constant(name).tolist()
        return self._reference(name)

    def _reference(self, name: str) -> tuple[str, Any]:
        if name in self._values:
            return "value", name
        array = _float32(self._arrays[name]) if name in self._arrays else self._known[name].numpy()
        return "weight", self._name(self._weights.parameter(array))

    def _name(self, parameter: torch.nn.Parameter) -> str:
        key = id(parameter)
        if key not in self._names:
            self._names[key] = f"weight{len(self._names)}"
            self.register_parameter(self._names[key], parameter)
        return self._names[key]

    def _is_known(self, name: str) -> bool:
        return name in self._known or name in self._arrays

    def _array(self, name: str) -> Array | None:
        if not name:
            return None
        return self._arrays[name] if name in self._arrays else self._known[name].numpy()

    def _constant(self, name: str) -> Tensor:
        if name not in self._known:
            self._known[name] = torch.from_numpy(np.array(_float32(self._arrays[name])))
        return self._known[name]

    def _now(self, reference: tuple[str, Any]) -> Any:
        kind, what = reference
        if kind == "value":
            return self._values[what]
        return getattr(self, what).data if kind == "weight" else what

    def _skip(self, node: Node) -> bool:
        """Drop an addition of zeros and a product with ones, which slots that no adapter uses leave behind."""
        neutral = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}.get(node.op_type)
        if neutral is None or node.domain:
            return False
        for kept, dropped in ((0, 1), (1, 0)) if node.op_type in ("Add", "Mul") else ((0, 1),):
            value, constant = node.inputs[kept], node.inputs[dropped]
            if value not in self._values or not self._is_known(constant):
                continue
            array = self._constant(constant)
            shape = np.broadcast_shapes(tuple(self._values[value].shape), tuple(array.shape))
            if shape == tuple(self._values[value].shape) and bool((array == neutral).all()):
                self._add(node, _as_it_is, [("value", value)], {})
                return True
        return False

    def _open_ended(self, node: Node) -> bool:
        """Plan a node whose shape would depend on a value, which edgeadapt's decoders use for positions alone.

        `logits_from` says from which position on logits are wanted: here it is the one position. Tables that are
        computed up to the last position are computed up to the largest.
        """
        if node.kind == ("", "Range"):
            start, limit, delta = node.inputs
            if not self._is_known(start):
                self._add(node, _one_position, [("value", start)], {})
            elif self._is_known(delta) and self._bound:
                first, step = int(self._constant(start)), int(self._constant(delta))
                self._known[node.outputs[0]] = torch.arange(first, self._bound, step, dtype=self._values[limit].dtype)
            else:
                return False
            return True
        if node.kind == ("", "Slice") and not self._is_known(node.inputs[1]):
            (axis,) = self._constant(node.inputs[3]).tolist()
            inputs = [self._reference(node.inputs[0]), ("setting", axis), ("value", node.inputs[1])]
            self._add(node, _one_slice, inputs, {})
            return True
        return False

    def _drop_unused(self) -> None:
        """Drop steps that no output needs, and parameters that no step needs."""
        wanted = {what for kind, what in self._outputs if kind == "value"}
        kept: list[Step] = []
        for step in reversed(self._steps):
            if wanted.intersection(step.node.outputs):
                wanted.update(what for kind, what in step.inputs if kind == "value")
                kept.append(step)
        self._steps = kept[::-1]
        used = {what for step in kept for kind, what in step.inputs if kind == "weight"}
        used |= {what for kind, what in self._outputs if kind == "weight"}
        for name in set(self._parameters) - used:
            delattr(self, name)


def _as_it_is(_node: Node, x: Tensor) -> Tensor:
    return x


def _one_position(_node: Node, start: Tensor) -> Tensor:
    return start.reshape(1)


def _one_slice(_node: Node, x: Tensor, axis: int, start: Tensor) -> Tensor:
    return torch.index_select(x, axis, start.reshape(1))


def _empty_product(node: Node, inputs: Sequence[Any]) -> bool:
    return node.kind == ("", "MatMul") and inputs[0].shape[-1] == 0


def _keep(node: Node, found: Any, values: dict[str, Tensor]) -> None:
    outputs = found if isinstance(found, (tuple, list)) else (found,)
    values.update({name: value for name, value in zip(node.outputs, outputs, strict=False) if name})


def _float32(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype in (np.float16, np.float64) else array
