"""Products with stored codes that become float32 products, against ONNX Runtime's own MatMulNBits."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeadapt.errors import BundleError
from edgeadapt.profiling.unpacked_products import SESSION_OPTION, unpack_products

ROWS = 24


def product(bits, columns, size, *, zeros=False, bias=False, twice=False, **changes):
    """A model y = x W^T (+ b) with W in codes, computed in float32; with `twice`, z = 2 x W^T of the same codes too."""
    rng = np.random.default_rng(bits + columns)
    blocks = -(-columns // size)
    codes = rng.integers(0, 256, (ROWS, blocks, size * bits // 8), np.uint8)
    stored = {"codes": codes, "scales": rng.uniform(0.01, 0.1, ROWS * blocks).astype(np.float32)}
    if zeros:
        stored["zeros"] = rng.integers(0, 256, (ROWS, -(-blocks * bits // 8)), np.uint8)
    if bias:
        stored["bias"] = rng.normal(size=ROWS).astype(np.float32)
    stored |= changes.pop("stored", {})
    reads = ["codes", "scales", "zeros" if "zeros" in stored else "", "groups" if "groups" in stored else ""]
    reads += ["bias"] if bias else []
    sizes = {"K": columns, "N": ROWS, "bits": bits, "block_size": size, "domain": "com.microsoft"}
    nodes = [helper.make_node("MatMulNBits", ["x", *reads], ["y"], name="one", **sizes)]
    outputs = ["y"]
    if twice:
        nodes += [helper.make_node("Add", ["x", "x"], ["xx"])]
        nodes += [helper.make_node("MatMulNBits", ["xx", *reads], ["z"], name="two", **sizes)]
        outputs += ["z"]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", columns])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "seq", ROWS]) for name in outputs],
        initializer=[numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    opsets = [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("", changes.pop("opset", 21))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def answers(model, x):
    return onnxruntime.InferenceSession(model).run(None, {"x": x})


def operators_that_run(model, tmp_path):
    """What is left of a graph when a session with the option is open."""
    options = onnxruntime.SessionOptions()
    for group, values in SESSION_OPTION.items():
        for key, value in values.items():
            options.add_session_config_entry(f"{group}.{key}", value)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(model, options)
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "size"), [(64, 32), (96, 32), (128, 128), (80, 32), (40, 16)])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_answers_are_those_of_the_codes_and_nothing_is_unpacked_in_a_run(
    tmp_path, bits, columns, size, zeros, bias
):
    model = product(bits, columns, size, zeros=zeros, bias=bias).SerializeToString()
    x = np.random.default_rng(1).normal(size=(2, 3, columns)).astype(np.float32)
    found = unpack_products(model, "m.onnx")
    if bits == 4 and zeros and -(-columns // size) % 2:
        assert (found.products, found.left, found.float_bytes) == (0, 1, 0)
        assert "MatMulNBits" in operators_that_run(found.model, tmp_path)
    else:
        assert (found.products, found.left, found.float_bytes) == (1, 0, 4 * ROWS * columns)
        assert sorted(set(operators_that_run(found.model, tmp_path))) == ["Add", "FusedMatMul"][not bias :]
    onnx.checker.check_model(onnx.load_from_string(found.model))
    np.testing.assert_allclose(answers(found.model, x)[0], answers(model, x)[0], rtol=1e-5, atol=1e-5)


def test_codes_that_two_products_read_are_unpacked_once(tmp_path):
    model = product(8, 64, 32, twice=True).SerializeToString()
    found = unpack_products(model, "m.onnx")
    assert (found.products, found.left, found.float_bytes) == (2, 0, 4 * ROWS * 64)
    graph = onnx.load_from_string(found.model).graph
    assert not {"codes", "scales"} & {tensor.name for tensor in graph.initializer}
    kinds = [node.op_type for node in graph.node]
    assert kinds == ["DequantizeLinear", "FusedMatMul", "Add", "FusedMatMul"]
    x = np.random.default_rng(1).normal(size=(1, 2, 64)).astype(np.float32)
    for one, other in zip(answers(found.model, x), answers(model, x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_bytes_beside_the_model_stay_where_they_lie(tmp_path):
    model = product(4, 64, 32, zeros=True)
    x = np.random.default_rng(1).normal(size=(1, 2, 64)).astype(np.float32)
    before = answers(model.SerializeToString(), x)[0]
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    weights = (tmp_path / "weights.bin").read_bytes()
    found = unpack_products((tmp_path / "m.onnx").read_bytes(), "m.onnx")
    assert found.products == 1
    (tmp_path / "m.onnx").write_bytes(found.model)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    np.testing.assert_allclose(session.run(None, {"x": x})[0], before, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "weights.bin").read_bytes() == weights
    assert len(found.model) < 4096


@pytest.mark.parametrize(
    "changes",
    [
        {"opset": 20},
        {"stored": {"zeros": np.full((ROWS, 2), 7.5, np.float32)}},
        {"stored": {"groups": np.repeat([1, 0], 32).astype(np.int32)}},
        {"stored": {"scales": np.ones(ROWS * 2, np.float16)}},
    ],
)
def test_products_that_cannot_be_unpacked_stay_as_they_are(changes):
    model = product(8, 64, 32, **changes)
    found = unpack_products(model.SerializeToString(), "m.onnx")
    assert (found.products, found.left) == (0, 1)
    assert onnx.load_from_string(found.model) == model


@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda _: b"\xff" * 20, lambda _: b"", lambda _: b"\x08\1"]
)
def test_what_is_no_model_is_refused(damage):
    data = product(8, 64, 32).SerializeToString()
    with pytest.raises(BundleError, match=r"m\.onnx is not an ONNX graph"):
        unpack_products(damage(data), "m.onnx")
