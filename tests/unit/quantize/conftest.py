"""Small marked models, and a way to run them: markers give way to what they pass through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgeadapt.export.graph import ADAPTER_SITE, MARKER_DOMAIN, PARAMETER_SITE, Graph

Array = NDArray[Any]
Run = Callable[..., dict[str, Array]]


class Builder:
    """Nodes, one after the other."""

    def __init__(self) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, "com.microsoft": 1, MARKER_DOMAIN: 1}, name="g")
        self.count = 0

    def input(self, name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.inputs.append(value)
        return value

    def constant(self, name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(self, kind: str, inputs: list[ir.Value], domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes, domain=domain)
        self.count += 1
        node.outputs[0].name = f"v{self.count}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.append(node)
        return node.outputs[0]

    def site(self, path: str, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.node(ADAPTER_SITE, [x, y], MARKER_DOMAIN, site=path)

    def parameter(self, name: str, value: ir.Value) -> ir.Value:
        return self.node(PARAMETER_SITE, [value], MARKER_DOMAIN, parameter=name)

    def output(self, name: str, value: ir.Value) -> None:
        value.name = name
        self.graph.outputs.append(value)

    def done(self) -> Graph:
        return Graph({"model": ir.Model(self.graph, ir_version=10)}, "feature-extraction")


@pytest.fixture
def builder() -> Builder:
    return Builder()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a marked graph's model in ONNX Runtime; `accuracy_level` replaces that of its MatMulNBits nodes."""

    def run(graph: Graph, feeds: Mapping[str, Array], accuracy_level: int | None = None) -> dict[str, Array]:
        model = graph.models["model"].clone()
        for node in list(model.graph):
            if node.domain == MARKER_DOMAIN:
                _unmark(model.graph, node)
            elif node.op_type == "MatMulNBits" and accuracy_level is not None:
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", accuracy_level)
        model.graph.opset_imports.pop(MARKER_DOMAIN)
        path = tmp_path / "model.onnx"
        ir.save(model, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return run


def _unmark(graph: ir.Graph, node: ir.Node) -> None:
    through = ir.node("Identity", [node.inputs[-1]])
    ir.convenience.replace_nodes_and_values(graph, node, [node], [through], [node.outputs[0]], [through.outputs[0]])


@pytest.fixture
def tiny(builder: Builder) -> Graph:
    """Embedding, a linear layer of each form, and a head that shares the embedding.

    `gemm` has a bias, `fused` lies [out, in], `ragged` has 72 inputs, which no block divides, `small` is too small, and
    `replaced` is an adapter's.
    """
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> Array:
        return (random.standard_normal(shape) / np.sqrt(64)).astype(np.float32)

    ids = builder.input("input_ids", ["batch"], ir.DataType.INT64)
    table = builder.constant("embed.weight", matrix(50, 64))
    h = builder.site("embed", ids, builder.node("Gather", [table, ids]))
    y = builder.node("MatMul", [h, builder.constant("w0", matrix(64, 96))])
    y = builder.site("plain", h, y)
    bias = builder.constant("b1", matrix(64))
    h2 = builder.site("gemm", y, builder.node("Gemm", [y, builder.constant("w1", matrix(64, 96)), bias], transB=1))
    product = builder.node(
        "MatMul", [h2, builder.node("Transpose", [builder.constant("w2", matrix(72, 64))], perm=[1, 0])]
    )
    h3 = builder.site("turned", h2, builder.node("Add", [product, builder.constant("b2", matrix(72))]))
    fused = builder.node("FusedMatMul", [h3, builder.constant("w3", matrix(64, 72))], "com.microsoft", transB=1)
    h4 = builder.site("ragged", h3, fused)
    h5 = builder.site("small", h4, builder.node("MatMul", [h4, builder.constant("w4", matrix(64, 8))]))
    builder.output("small_out", h5)
    given = builder.parameter("classifier.weight", builder.constant("w5", matrix(32, 64)))
    kept = builder.node("MatMul", [h4, builder.node("Transpose", [given], perm=[1, 0])])
    builder.output("replaced_out", builder.site("classifier", h4, kept))
    head = builder.node("FusedMatMul", [h4, table], "com.microsoft", transB=1)
    builder.output("logits", builder.site("lm_head", h4, head))
    return builder.done()
