"""What a conversion is asked for, and what it answers: JSON in a file, JSON on stdout.

The request: `{"models": {NAME: {"graph": PATH, "held": PATH, "signatures": {NAME: SIGNATURE}}}, "output": FOLDER,
"precision": "float32" | "int8", "defaults": {NAME: SHAPE}}`. The first model is "plain", the base. A signature is
`{"inputs": {NAME: TENSOR}, "fixed": {NAME: TENSOR}, "bound": N}`, a tensor `{"dtype": "float32", "shape": [1, 8],
"fill": 0}`: what an input looks like, or what it is for good. `held`, which may be left out, is an .npz file of arrays
that inputs are for good: an adapter's. `defaults` are inputs of "slots" whose values without an adapter are written
beside the models, to defaults.npz.

The answer: `{"result": {"versions": {...}, "models": {NAME: {"files": [...], "signatures": {NAME: {"inputs": [...],
"outputs": [...]}}}}}}`, or `{"error": {"message", "hint"}}`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .graph import ConversionError, Graph, read_graph
from .network import Network, Weights

Array = NDArray[Any]
Precision = Literal["float32", "int8"]
PLAIN = "plain"
"""The name of the base's model."""


class Model(NamedTuple):
    """One model to be written: its signatures, which share their weights."""

    name: str
    signatures: Mapping[str, Network]


Write = Callable[[Model, Path, Precision], list[str]]
"""Writes a model into a folder and returns the names of its files, the one to open first."""


def answer(request: Mapping[str, Any], write: Write) -> dict[str, Any]:
    """Return what was converted.

    Raises:
        ConversionError: if a graph holds something that cannot be converted.
    """
    folder, models = Path(request["output"]), {}
    weights = Weights()
    for name, wanted in request["models"].items():
        graph = holding(read_graph(Path(wanted["graph"])), wanted.get("held"))
        signatures = {key: network(graph, value, weights) for key, value in wanted["signatures"].items()}
        files = write(Model(name, signatures), folder, request["precision"])
        models[name] = {
            "files": files,
            "signatures": {
                key: {
                    "inputs": {
                        name: list(value.shape) for name, value in zip(item.input_names, item.examples, strict=True)
                    },
                    "outputs": list(item.output_names),
                }
                for key, item in signatures.items()
            },
        }
        if name == "slots":
            defaults = {key: neutral(graph, key, shape) for key, shape in request.get("defaults", {}).items()}
            np.savez(folder / "defaults.npz", allow_pickle=False, **defaults)
    return {"models": models}


def holding(graph: Graph, path: str | None) -> Graph:
    """Return the graph with the arrays of a file as the values of its inputs.

    Raises:
        ConversionError: if it has no such input.
    """
    if path is None:
        return graph
    with np.load(path) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    unknown = sorted(set(held) - set(graph.inputs))
    if unknown:
        raise ConversionError(f"the graph has no input {unknown[0]!r}", hint="this is a bug; please report it")
    return replace(graph, constants={**graph.constants, **held})


def neutral(graph: Graph, name: str, shape: Sequence[int]) -> Array:
    """Return what stands for no adapter at an input of the slots graph, with `shape`.

    Raises:
        ConversionError: if the graph's default cannot be brought to this shape without changing what it says.
    """
    value = np.asarray(graph.constants[name], np.float32)
    if value.ndim == len(shape):
        if all(have in (0, want) for have, want in zip(value.shape, shape, strict=True)):
            return np.zeros(shape, np.float32) if value.size == 0 else value
        if all(have in (1, want) for have, want in zip(value.shape, shape, strict=True)):
            return np.ascontiguousarray(np.broadcast_to(value, shape))
    raise ConversionError(
        f"input {name!r} has the shape {list(value.shape)} without an adapter, and {list(shape)} with one",
        hint="its head has another size than the base's: profile with a runtime that reads ONNX (onnxruntime)",
    )


def network(graph: Graph, signature: Mapping[str, Any], weights: Weights) -> Network:
    """Return the module of one signature."""
    inputs, fixed = ({name: tensor(value) for name, value in signature[part].items()} for part in ("inputs", "fixed"))
    return Network(graph, inputs, fixed, weights, bound=signature.get("bound", 0)).eval()


def tensor(value: Mapping[str, Any]) -> torch.Tensor:
    """Return the tensor that a request describes."""
    return torch.full(tuple(value["shape"]), value.get("fill", 0), dtype=getattr(torch, value["dtype"]))


def main(write: Write) -> int:
    """Answer the request in the file that the command line names."""
    # libraries that print must not end up in the answer
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        reply: dict[str, Any] = {"result": answer(json.loads(Path(sys.argv[1]).read_text()), write)}
    except ConversionError as error:
        reply = {"error": {"message": error.message, "hint": error.hint}}
    except Exception as error:  # noqa: BLE001 - a converter's own failures come in any class; the trace goes to stderr
        traceback.print_exc()
        reply = {
            "error": {
                "message": f"the converter failed: {type(error).__name__}: {str(error)[:400]}",
                "hint": "its own messages are above; profile this bundle with a runtime that reads ONNX (onnxruntime)",
            }
        }
    with stdout:
        json.dump(reply, stdout)
    return 0
