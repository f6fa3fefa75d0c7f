"""A gain of a module's inputs in the graph: what the module gives for inputs that were scaled before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.errors import ExportError
from edgeadapt.export.graph import Graph
from edgeadapt.quantize.join import join_products
from edgeadapt.quantize.lower import lower
from edgeadapt.quantize.quantize import quantize

IN, OUT = 64, 32
RANDOM = np.random.default_rng(3)
WEIGHT = (RANDOM.standard_normal((IN, OUT)) / 8).astype(np.float32)
BIAS = RANDOM.standard_normal(OUT).astype(np.float32)
X = RANDOM.standard_normal((3, 4, IN)).astype(np.float32)
GAIN = RANDOM.uniform(0.2, 3, IN).astype(np.float32)


def module(path: str, kind: str = "linear") -> TargetModule:
    return TargetModule(path, kind, "Linear", (OUT, IN), IN, OUT, True, "")  # type: ignore[arg-type]


def matmul(builder: Any, x: ir.Value) -> ir.Value:
    return builder.node("MatMul", [x, builder.constant("weight", WEIGHT)])


def with_bias(builder: Any, x: ir.Value) -> ir.Value:
    return builder.node("Add", [matmul(builder, x), builder.constant("bias", BIAS)])


def fused(builder: Any, x: ir.Value) -> ir.Value:
    weight = builder.constant("weight", np.ascontiguousarray(WEIGHT.T))
    return builder.node("FusedMatMul", [x, weight], "com.microsoft", transB=1)


def gemm(builder: Any, x: ir.Value) -> ir.Value:
    """GPT-2's Conv1D: rows of all texts, one product with a bias, and texts again."""
    rows = builder.node("Reshape", [x, builder.constant("rows", np.array([-1, IN]))])
    product = builder.node("Gemm", [rows, builder.constant("weight", WEIGHT), builder.constant("bias", BIAS)])
    return builder.node("Reshape", [product, builder.constant("texts", np.array([-1, X.shape[1], OUT]))])


FORMS = (matmul, with_bias, fused, gemm)


def graph_of(builder: Any, make: Callable[[Any, ir.Value], ir.Value]) -> Graph:
    """Return a graph of one module."""
    x = builder.input("x", ["batch", "seq", IN])
    y = builder.site("m", x, make(builder, x))
    y.shape = ir.Shape(["batch", "seq", OUT])
    builder.output("y", y)
    return builder.done()


def lowered(graph: Graph, *terms: str) -> Graph:
    model = graph.models["model"].clone()
    found = lower(model, {"m": frozenset(terms)} if terms else {}, set(), set(), {"m": module("m")})
    assert found.terms == ({"m": frozenset(terms)} if terms else {})
    model.opset_imports["edgeadapt"] = 1  # `run` takes it away
    return Graph({"model": model}, graph.task)


@pytest.mark.parametrize("scheme", ["none", "fp16", "int8", "int4"])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_as_if_the_input_had_been_scaled(form: Any, scheme: str, builder: Any, run: Any) -> None:
    graph = graph_of(builder, form)
    if scheme != "none":
        graph, _ = quantize(graph, scheme)
    plain, slots = lowered(graph), lowered(graph, "input_gain")
    declared = next(value for value in slots.models["model"].graph.inputs if value.name == "m.input_gain")
    assert declared.shape is None
    expected = run(plain, {"x": X * GAIN})["y"]
    assert np.abs(expected - run(plain, {"x": X})["y"]).max() > 0.1
    np.testing.assert_array_equal(run(slots, {"x": X, "m.input_gain": GAIN})["y"], expected)
    np.testing.assert_array_equal(run(slots, {"x": X})["y"], run(plain, {"x": X})["y"])
    rows = RANDOM.uniform(0.2, 3, (3, 1, IN)).astype(np.float32)
    np.testing.assert_array_equal(run(slots, {"x": X, "m.input_gain": rows})["y"], run(plain, {"x": X * rows})["y"])
    products = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")
    assert len([node for node in slots.models["model"].graph if node.op_type in products]) == 1


@pytest.mark.parametrize("form", FORMS)
def test_all_terms_at_once(form: Any, builder: Any, run: Any) -> None:
    """The low-rank term reads the input as it is."""
    graph = graph_of(builder, form)
    a, b = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((IN, 2), (2, OUT)))
    gain, offset = (RANDOM.standard_normal(OUT).astype(np.float32) for _ in range(2))
    terms = {"lora_A": a, "lora_B": b, "gain": gain, "offset": offset, "input_gain": GAIN}
    slots = lowered(graph, "a", "b", "gain", "offset", "input_gain")
    found = run(slots, {"x": X, **{f"m.{name}": value for name, value in terms.items()}})["y"]
    y = run(lowered(graph), {"x": X * GAIN})["y"]
    np.testing.assert_allclose(found, (y + X @ a @ b) * gain + offset, rtol=1e-4, atol=1e-4)


def test_without_a_product_there_is_nothing_to_scale(builder: Any) -> None:
    graph = graph_of(builder, lambda made, x: made.node("Identity", [x]))
    with pytest.raises(ExportError) as caught:
        lowered(graph, "input_gain")
    assert str(caught.value) == (
        "an adapter scales the input of m, but the graph has no product between that and its output\n"
        "Hint: export with --merge, and report the architecture"
    )


@pytest.mark.parametrize("apart", [(), ("attn.k",)])
def test_a_module_whose_input_is_scaled_is_not_joined(apart: tuple[str, ...], builder: Any, run: Any) -> None:
    x = builder.input("x", ["batch", "seq", IN])
    paths = ("attn.q", "attn.k", "attn.v")
    for path in paths:
        weight = builder.constant(f"{path}.weight", RANDOM.standard_normal((IN, OUT)).astype(np.float32))
        y = builder.site(path, x, builder.node("MatMul", [x, weight]))
        builder.output(path[-1], builder.node("Tanh", [y]))
    graph, _ = quantize(builder.done(), "int8")
    before = run(graph, {"x": X})
    model = graph.models["model"]
    join_products(model, apart)
    found = lower(model, dict.fromkeys(apart, frozenset({"input_gain"})), set(), set(), {p: module(p) for p in paths})
    assert found.joined == ()
    widths = sorted(node.attributes["N"].as_int() for node in model.graph if node.op_type == "MatMulNBits")
    assert widths == ([OUT, 2 * OUT] if apart else [3 * OUT])
    model.opset_imports["edgeadapt"] = 1
    after = run(graph, {"x": X})
    assert all(after[name].tobytes() == before[name].tobytes() for name in "qkv")
    if apart:
        scaled = run(graph, {"x": X, "attn.k.input_gain": GAIN})
        assert [bool((scaled[name] == before[name]).all()) for name in "qkv"] == [True, False, True]
