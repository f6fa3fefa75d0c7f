"""The table of operators: what each needs to know before a run, and how torch computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .graph import ConversionError, Node

Tensor = torch.Tensor
Compute = Callable[..., Any]
Prepare = Callable[..., Any]
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Operator:
    """One operator.

    compute: from the node and its inputs to a tensor, or a tuple of them where there are several outputs; an input that
        is left out is None, one of `settings` a list of numbers (or a number, if it has no axes)
    settings: positions of inputs that must be known before the run, because they decide about shapes
    prepare: makes one constant, which takes the place of the inputs at `prepared`; None where nothing is prepared
    prepared: positions of the constants that it is made of
    """

    compute: Compute
    settings: tuple[int, ...] = ()
    prepare: Prepare | None = None
    prepared: tuple[int, ...] = ()


OPERATORS: dict[tuple[str, str], Operator] = {}
"""Operators by domain and type; the modules that hold them fill it when they are imported."""


def operator(
    *names: str,
    domain: str = "",
    settings: tuple[int, ...] = (),
    prepare: Prepare | None = None,
    prepared: tuple[int, ...] = (),
) -> Callable[[Compute], Compute]:
    """Enter a function into the table under these names."""

    def enter(compute: Compute) -> Compute:
        for name in names:
            OPERATORS[domain, name] = Operator(compute, settings, prepare, prepared)
        return compute

    return enter


def find(node: Node) -> Operator:
    """Return the operator of a node.

    Raises:
        ConversionError: if there is none, naming it.
    """
    if node.kind not in OPERATORS:
        raise ConversionError(
            f"the graph has the operator {node.label} (node {node.name!r}), which this conversion does not know",
            hint="profile this bundle with a runtime that reads ONNX (onnxruntime, openvino)",
        )
    return OPERATORS[node.kind]


def refuse_attributes(node: Node, allowed: Mapping[str, Any]) -> None:
    """Refuse attributes that would change the result and that the operator here does not look at.

    Args:
        node: the node.
        allowed: attributes that are known; a value of `...` stands for any, another for the only one that is taken.

    Raises:
        ConversionError: naming the first attribute of another kind.
    """
    for name, value in node.attributes.items():
        if name not in allowed or (allowed[name] is not ... and value != allowed[name]):
            raise ConversionError(
                f"{node.label} (node {node.name!r}) has {name} = {value!r}, which this conversion does not know",
                hint="profile this bundle with a runtime that reads ONNX (onnxruntime, openvino)",
            )
