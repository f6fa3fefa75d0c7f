"""ONNX files as nodes and arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]


class ConversionError(Exception):
    """What a graph asks for that cannot be converted: `message`, and `hint`, the next step."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Node:
    """One operator of a graph.

    inputs: names, "" for one that is left out; attributes: numbers, strings, arrays, and lists of them
    """

    domain: str
    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def kind(self) -> tuple[str, str]:
        """What the table of operators has it under: its domain and type."""
        return self.domain, self.op_type

    @property
    def label(self) -> str:
        """The operator as people write it."""
        return f"{self.domain}::{self.op_type}" if self.domain else self.op_type

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, `default` where it is not set."""
        return self.attributes.get(name, default)


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can run.

    inputs: names of all inputs, with those that have a default; constants: arrays by name, defaults among them
    """

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Array]


def read_graph(path: Path) -> Graph:
    """Return the graph of an ONNX file and of the weights file beside it.

    Raises:
        ConversionError: if it cannot be read.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ConversionError(
            f"{path} cannot be read as ONNX: {error}", hint="run `edgeadapt verify` on the bundle"
        ) from error
    graph = model.graph
    return Graph(
        nodes=tuple(_node(node) for node in graph.node),
        inputs=tuple(value.name for value in graph.input),
        outputs=tuple(value.name for value in graph.output),
        constants={tensor.name: _array(tensor, path) for tensor in graph.initializer},
    )


def _array(tensor: Any, path: Path) -> Array:
    """Return a constant; those of the weights file are read when they are used."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {item.key: item.value for item in tensor.external_data}
    file = path.parent / place["location"]
    if file.parent != path.parent:
        raise ConversionError(
            f"{path}: {tensor.name!r} lies in {place['location']!r}, outside of the folder",
            hint="run `edgeadapt verify` on the bundle",
        )
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(file, dtype, "r", int(place.get("offset", 0)), shape or (1,)).reshape(shape)


def _node(proto: Any) -> Node:
    attributes = {item.name: _attribute(helper.get_attribute_value(item)) for item in proto.attribute}
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    return Node(domain, proto.op_type, proto.name, tuple(proto.input), tuple(proto.output), attributes)


def _attribute(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, tuple)):
        return [_attribute(item) for item in value]
    return value


def digest_key(array: Array) -> tuple[Any, ...]:
    """Return what equal arrays have in common, so that they are stored once."""
    data = np.ascontiguousarray(array)  # which has at least one axis
    return data.dtype.str, array.shape, hashlib.sha256(data.data if data.size else b"").hexdigest()
