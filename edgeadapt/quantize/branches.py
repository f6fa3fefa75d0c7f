"""Branches beside modules of one slots graph: y' = y + form(x, y), a form being a file in `forms/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeadapt import registry
from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.errors import ExportError
from edgeadapt.export.graph import ADAPTER_SITE
from edgeadapt.quantize.drawing import OUTPUTS, Place
from edgeadapt.slots import BranchKind

AddInput = Callable[[str, Any, Sequence[int | str]], ir.Value]

FORMS = "edgeadapt.quantize.forms"
_PRODUCT = "Mul"
_ACTIVATIONS = ("Relu", "Gelu", "Tanh", "Sigmoid", "LeakyRelu", "HardSwish", "Clip", _PRODUCT)
_PASSED = ("BatchNormalization", ADAPTER_SITE)
_MOVES = ("Reshape", "Transpose")
_ATTENTION_BIAS = 5
"""The input of MultiHeadAttention that is added to its scores."""
Shapes = Mapping[str, tuple[int | str, ...]]


def form_module(form: str) -> ModuleType:
    """Return the module of a form.

    Raises:
        ExportError: there is no such form.
    """
    return registry.load(FORMS, form, ExportError)


def branch_shapes(kind: BranchKind, module: TargetModule) -> Shapes:
    """Return the shape of each term, with names for axes whose lengths are the adapter's to choose."""
    shapes: Shapes = form_module(kind.form).shapes(module, dict(kind.settings))
    return shapes


class Branches:
    """Adds the branches of one slots graph.

    found: the kinds at each module that has any
    """

    def __init__(self, wanted: Mapping[str, frozenset[BranchKind]], add_input: AddInput) -> None:
        self._wanted = wanted
        self._add_input = add_input
        self._inputs: dict[str, dict[str, ir.Value]] = {}
        self._behind: dict[str, ir.Value] = {}
        self._seen: set[str] = set()
        self.found: dict[str, frozenset[BranchKind]] = {}

    def add(
        self,
        graph: ir.Graph,
        marker: ir.Node,
        sites: tuple[str, ...],
        y: ir.Value,
        modules: Mapping[str, TargetModule],
    ) -> ir.Value:
        """Return `y`, what lies behind `marker` so far, with all branches of its module added; each reads y itself.

        Some read what lies behind modules before it, as noted.

        Raises:
            ExportError: if the module is computed together with others.
        """
        site = next((site for site in sites if site in self._wanted), None)
        if site is None:
            return y
        if len(sites) > 1:
            raise ExportError(
                f"module {site} is computed together with {', '.join(other for other in sites if other != site)}, and "
                "an adapter has a network there alone",
                hint="export with --quantize fp16 or none, which join no products",
            )
        self.found[site] = self._wanted[site]
        nodes: list[ir.Node] = []
        result, x = y, marker.inputs[0]
        assert x is not None  # a marker has all its inputs
        for kind in sorted(self._wanted[site]):
            terms = self._terms(kind, modules[site])
            place = Place(modules[site], marker, x, y, terms, dict(kind.settings), nodes, self._behind)
            added = form_module(kind.form).draw(place)
            _give(graph, place, kind.prefix(site))
            where = place.settings.get("adds", "output")
            if where in _ADD_ELSEWHERE:
                _ADD_ELSEWHERE[str(where)](graph, marker, added, site)
            else:
                result = place.add("Add", [result, added])
        graph.insert_before(marker, nodes)
        return result

    def note(self, sites: tuple[str, ...], result: ir.Value) -> None:
        """Remember what lies behind a marker's module: for those after it. One that runs twice has no one output."""
        if len(sites) == 1 and sites[0] not in self._seen:
            self._behind[sites[0]] = result
        else:
            for site in sites:
                self._behind.pop(site, None)
        self._seen.update(sites)

    def _terms(self, kind: BranchKind, module: TargetModule) -> dict[str, ir.Value]:
        """Return the optional inputs: zeros, and none of them along an axis that has a name, are the identity.

        One output stands for any number.
        """
        prefix = kind.prefix(module.path)
        shortest = getattr(form_module(kind.form), "SHORTEST", {})
        if prefix not in self._inputs:
            self._inputs[prefix] = {
                term: self._add_input(
                    f"{prefix}.{term}",
                    np.zeros([_default_length(axis, shortest) for axis in shape], np.float32),
                    [f"{prefix}.{axis}" if isinstance(axis, str) else axis for axis in shape],
                )
                for term, shape in branch_shapes(kind, module).items()
            }
        return self._inputs[prefix]


def _default_length(axis: int | str, shortest: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    return 1 if axis == OUTPUTS else shortest.get(axis.rpartition(".")[2], 0)


def check_roles(kinds: Mapping[str, frozenset[BranchKind]], role: str) -> None:
    """Refuse branches that see whole texts in a decoder, which sees a text piece by piece.

    Raises:
        ExportError: naming the module.
    """
    for site, found in kinds.items():
        for kind in found:
            if role == "decoder" and getattr(form_module(kind.form), "WHOLE_TEXT", False):
                raise ExportError(
                    f"an adapter has a network ({kind.form}) beside module {site} that sees the whole text at once, "
                    "and this model generates a text piece by piece",
                    hint="export an encoder, such as a classifier, with --task",
                )


def branch_outputs(kind: BranchKind, site: str) -> dict[str, str]:
    """Return the graph's outputs that a branch gives beside its result, by what they are."""
    return {name: f"{kind.prefix(site)}.{name}" for name in getattr(form_module(kind.form), "OUTPUTS_BESIDE", ())}


def _give(graph: ir.Graph, place: Place, prefix: str) -> None:
    """Make what the form gives beside its result outputs of the graph."""
    for name, (value, shape) in place.outputs.items():
        if any(output.name == f"{prefix}.{name}" for output in graph.outputs):
            continue  # the module runs twice; the first run counts
        value.name = f"{prefix}.{name}"
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(value)


def _add_behind_activation(graph: ir.Graph, marker: ir.Node, added: ir.Value, site: str) -> None:
    """Add a value to what the norm and the activation behind a module make of its output."""
    node: ir.Node | None = marker
    while node is not None and node.op_type not in _ACTIVATIONS:
        node = _next_activation(node)
    if node is None:
        raise ExportError(
            f"the graph has no activation behind module {site}, to whose result an adapter adds",
            hint="this architecture is not supported yet for adapters of this kind",
        )
    value = node.outputs[0]
    uses = list(value.uses())
    total = ir.node("Add", [value, added])
    for user, index in uses:
        user.replace_input_with(index, total.outputs[0])
    graph.insert_after(node, total)


def _next_activation(node: ir.Node) -> ir.Node | None:
    """Return the norm, marker or activation that alone reads a node's output; of x sigmoid(x) the product."""
    users = list(dict.fromkeys(user for user, _ in node.outputs[0].uses()))
    if len(users) == 1 and users[0].op_type in (*_ACTIVATIONS, *_PASSED):
        return users[0]
    gates = [user for user in users if user.op_type == "Sigmoid"]
    products = [user for user in users if user.op_type == _PRODUCT]
    if len(users) == 2 and gates and products and gates[0].outputs[0] in products[0].inputs:
        return products[0]
    return None


def _add_to_scores(graph: ir.Graph, marker: ir.Node, added: ir.Value, site: str) -> None:
    """Add a value to the scores of the attention whose output a module reads."""
    value = marker.inputs[0]
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _MOVES:
        node = _producer(node, 0)
    if node is not None and node.op_type == "MatMul":
        node = _producer(node, 0)
    index = {"Softmax": 0, "MultiHeadAttention": _ATTENTION_BIAS}.get("" if node is None else node.op_type)
    scores = None if node is None or index is None or index >= len(node.inputs) else node.inputs[index]
    if node is None or index is None or scores is None:
        raise ExportError(
            f"module {site} does not read an attention with a bias, to whose scores an adapter adds",
            hint="this architecture is not supported yet for adapters of this kind",
        )
    total = ir.node("Add", [scores, added])
    graph.insert_before(node, total)
    node.replace_input_with(index, total.outputs[0])


def _producer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    return None if value is None else value.producer()


_ADD_ELSEWHERE = {"activated": _add_behind_activation, "scores": _add_to_scores}
