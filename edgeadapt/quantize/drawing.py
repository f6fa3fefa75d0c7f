"""Drawing a few nodes beside a module of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.errors import ExportError
from edgeadapt.quantize.bottleneck import activate, read_beside

OUTPUTS = "outputs"
"""The name of an axis that meets the module's outputs, however many a replaced head has."""


@dataclass(frozen=True)
class Place:
    """Where a branch is drawn.

    module: the base's; marker: its node; x, y: its input and output in the graph (y twice for a norm)
    terms: the graph inputs of the branch; settings: the branch's; nodes: those drawn so far, in order
    others: what lies behind the modules before this one, by path; not of those that are computed together with others
    outputs: what the form gives beside its result, with its shape: outputs of the graph that are no answer
    """

    module: TargetModule
    marker: ir.Node
    x: ir.Value
    y: ir.Value
    terms: Mapping[str, ir.Value]
    settings: Mapping[str, str | int]
    nodes: list[ir.Node]
    others: Mapping[str, ir.Value] = field(default_factory=dict)
    outputs: dict[str, tuple[ir.Value, list[str | int]]] = field(default_factory=dict)

    def add(self, op: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """Draw one of ONNX's nodes and return its output."""
        node = ir.node(op, inputs, attributes=attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def number(self, value: float) -> ir.Value:
        """Draw a constant."""
        return self.add("Constant", [], value=ir.tensor(np.float32(value)))

    def integers(self, *values: int) -> ir.Value:
        """Draw a constant int64[n]."""
        return self.add("Constant", [], value=ir.tensor(np.array(values, np.int64)))

    def whole(self, value: int) -> ir.Value:
        """Draw a constant int64[]."""
        return self.add("Constant", [], value=ir.tensor(np.array(value, np.int64)))

    def activated(self, x: ir.Value) -> ir.Value:
        """Draw the activation that the settings name."""
        return activate(self.nodes, x, str(self.settings["activation"]))

    def behind(self, path: str) -> ir.Value:
        """Return what another module of the base gives, with what adapters add there.

        Raises:
            ExportError: it has no output of its own in this graph, or comes later.
        """
        if path not in self.others:
            raise ExportError(
                f"an adapter beside module {self.module.path} reads the output of {path}, which is not one value that "
                "the graph computes before it",
                hint="name the modules in the order in which the model runs them, each run once",
            )
        return self.others[path]

    def read(self) -> ir.Value:
        """Return what the settings say that it `reads`: "output", "residual" or "sum", as a bottleneck does."""
        return read_beside(self.nodes, self.marker, self.y, str(self.settings["reads"]), self.module.path)
