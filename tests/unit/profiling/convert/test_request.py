"""Models with an adapter's tensors in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeadapt.profiling.device_side.convert.graph import ConversionError
from edgeadapt.profiling.device_side.convert.request import Model, Precision, answer

RNG = np.random.default_rng(3)
WEIGHT, DOWN, UP = (RNG.normal(size=shape).astype(np.float32) for shape in ((6, 4), (6, 2), (2, 4)))
X = {"dtype": "float32", "shape": [3, 6], "fill": 1}


def _slots(folder: Path) -> Path:
    """Write y = x W + x A B, where A and B are inputs of no rank that have a default."""
    defaults = {"weight": WEIGHT, "a": np.zeros((6, 0), np.float32), "b": np.zeros((0, 4), np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["base"]),
        helper.make_node("MatMul", ["x", "a"], ["narrow"]),
        helper.make_node("MatMul", ["narrow", "b"], ["change"]),
        helper.make_node("Add", ["base", "change"], ["y"]),
    ]
    shapes: dict[str, list[int | str]] = {"x": [3, 6], "a": [6, "r"], "b": ["r", 4]}
    graph = helper.make_graph(
        nodes,
        "slots",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 4])],
        initializer=[numpy_helper.from_array(value, name) for name, value in defaults.items()],
    )
    path = folder / "slots.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return path


def _answers(folder: Path, held: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return what each of two models says: the bare graph, and the one that holds these arrays."""
    said: dict[str, torch.Tensor] = {}

    def write(model: Model, _folder: Path, _precision: Precision) -> list[str]:
        network = model.signatures["run_0"]
        said[model.name] = network(*network.examples)[0]
        return [model.name]

    np.savez(folder / "held.npz", allow_pickle=False, **held)
    wanted = {"graph": str(_slots(folder)), "signatures": {"run_0": {"inputs": {"x": X}, "fixed": {}}}}
    models = {"plain": wanted, "adapter.one": {**wanted, "held": str(folder / "held.npz")}}
    found = answer({"models": models, "output": str(folder), "precision": "float32"}, write)
    assert {name: list(each["signatures"]["run_0"]["inputs"]) for name, each in found["models"].items()} == {
        "plain": ["x"],
        "adapter.one": ["x"],
    }
    return said


def test_a_model_holds_an_adapter(tmp_path: Path) -> None:
    said = _answers(tmp_path, {"a": DOWN, "b": UP})
    x = np.ones((3, 6), np.float32)
    np.testing.assert_allclose(said["plain"].numpy(), x @ WEIGHT, rtol=0, atol=1e-6)
    np.testing.assert_allclose(said["adapter.one"].numpy(), x @ WEIGHT + x @ DOWN @ UP, rtol=0, atol=1e-5)


def test_an_array_of_no_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="the graph has no input 'c'"):
        _answers(tmp_path, {"a": DOWN, "c": UP})
