"""An ONNX graph's nodes and stored tensors, read from its file without the onnx package.

Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeadapt.errors import BundleError
from edgeadapt.files import read_bytes
from edgeadapt.profiling import wire

_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
"""Of one number, by ONNX's TensorProto.DataType."""


@dataclass(frozen=True)
class Node:
    """One operator; `attributes`: those that are whole numbers."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, int]


@dataclass(frozen=True)
class Stored:
    """A tensor that the file or its data file holds; two with the same `place` are one in memory."""

    shape: tuple[int, ...]
    size_bytes: int
    place: str


@dataclass(frozen=True)
class GraphFile:
    """A graph: nodes in order, stored tensors by name, and the names of its inputs and outputs."""

    nodes: tuple[Node, ...]
    stored: Mapping[str, Stored]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_graph(path: Path) -> GraphFile:
    """Return what the file at `path` holds, without its data.

    Raises:
        BundleError: if it is no ONNX graph, or nodes hold graphs of their own (loops and branches cannot be counted).
        FileError: if it cannot be read.
    """
    where = str(path)
    graphs = [value for number, value in wire.fields(memoryview(read_bytes(path)), where) if number == 7]
    if len(graphs) != 1 or isinstance(graphs[0], int):
        raise BundleError(f"{where} is not an ONNX graph", hint="check the bundle with `edgeadapt verify`")
    nodes: list[Node] = []
    stored: dict[str, Stored] = {}
    inputs: list[str] = []
    outputs: list[str] = []
    for number, value in wire.fields(graphs[0], where):
        if isinstance(value, int):
            continue
        if number == 1:
            nodes.append(read_node(value, where))
        elif number == 5:
            name, tensor = _stored(value, where)
            stored[name] = tensor
        elif number in (11, 12):
            (inputs if number == 11 else outputs).append(_first_text(value, 1, where))
    return GraphFile(tuple(nodes), stored, tuple(inputs), tuple(outputs))


def read_node(data: memoryview, where: str) -> Node:
    """Return the operator that a NodeProto describes.

    Raises:
        BundleError: if it is none, or holds a graph of its own.
    """
    inputs: list[str] = []
    outputs: list[str] = []
    attributes: dict[str, int] = {}
    for number, value in wire.fields(data, where):
        if number == 1:
            inputs.append(wire.text(value, where))
        elif number == 2:
            outputs.append(wire.text(value, where))
        elif number == 5 and not isinstance(value, int):
            attributes |= _attribute(value, where)
    name, op_type = _first_text(data, 3, where), _first_text(data, 4, where)
    return Node(name, op_type, tuple(inputs), tuple(outputs), attributes)


def _attribute(data: memoryview, where: str) -> dict[str, int]:
    """Return a whole number by its name, nothing for other attributes."""
    name, whole = "", None
    for number, value in wire.fields(data, where):
        if number == 1:
            name = wire.text(value, where)
        elif number == 3 and isinstance(value, int):
            whole = wire.signed(value)
        elif number in (6, 11):
            raise BundleError(
                f"{where}: a node holds a graph of its own ({name}), whose runs cannot be counted",
                hint="measure this bundle with `edgeadapt profile`",
            )
    return {} if whole is None else {name: whole}


def _stored(data: memoryview, where: str) -> tuple[str, Stored]:
    name, code, shape, raw = "", 0, [], 0
    external: dict[str, str] = {}
    for number, value in wire.fields(data, where):
        if number == 1:
            shape += wire.numbers(value, where)
        elif number == 2 and isinstance(value, int):
            code = value
        elif number == 8:
            name = wire.text(value, where)
        elif number == 9 and not isinstance(value, int):
            raw = len(value)
        elif number == 13 and not isinstance(value, int):
            external[_first_text(value, 1, where)] = _first_text(value, 2, where)
    size = math.ceil(math.prod(shape) * _BITS.get(code, 0) / 8) or raw
    place = f"{external['location']}@{external.get('offset', '0')}" if external else name
    return name, Stored(tuple(shape), size, place)


def _first_text(data: memoryview, wanted: int, where: str) -> str:
    return next((wire.text(value, where) for number, value in wire.fields(data, where) if number == wanted), "")
