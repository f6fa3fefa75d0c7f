"""Every operator that a conversion knows, against ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeadapt.profiling.device_side.convert.graph import ConversionError, read_graph
from edgeadapt.profiling.device_side.convert.network import Network, Weights
from edgeadapt.profiling.device_side.convert.operator_table import OPERATORS

MS = "com.microsoft"
RNG = np.random.default_rng(5)


def _f(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def _i(*values: Any) -> Any:
    return np.asarray(values, np.int64)


def _codes(*shape: int) -> Any:
    return RNG.integers(0, 256, shape).astype(np.uint8)


@dataclass(frozen=True)
class Case:
    """One node: `fed` are inputs of the graph, `held` constants, by position; a position in neither is left out."""

    op: str
    fed: dict[int, Any]
    held: dict[int, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    domain: str = ""
    outputs: int = 1
    tolerance: float = 2e-6

    @property
    def name(self) -> str:
        return f"{self.op}-{'-'.join(f'{k}={v}' for k, v in self.attributes.items())}"[:60]


def _binary(op: str, a: Any, b: Any) -> Case:
    return Case(op, {0: a, 1: b})


X = _f(2, 3, 8)
POSITIVE = np.abs(X) + 0.1
BOOLS = X > 0
PICTURE = _f(1, 4, 9, 9)
NORM = {0: X, 1: _f(8)}

CASES = [
    *(_binary(op, X, _f(3, 8)) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Greater", "Less")),
    *(_binary(op, X, X.copy()) for op in ("Equal", "GreaterOrEqual", "LessOrEqual")),
    *(_binary(op, BOOLS, _f(2, 3, 8) > 0) for op in ("And", "Or")),
    _binary("Div", _i(-7, 7, 8), _i(2, 2, 3)),
    _binary("Pow", POSITIVE, np.float32(3)),
    *(Case(op, {0: X}) for op in ("Abs", "Cos", "Erf", "Exp", "Identity", "Neg", "Relu", "Sigmoid", "Sin", "Tanh")),
    *(Case(op, {0: POSITIVE}) for op in ("Log", "Sqrt", "Reciprocal")),
    Case("Not", {0: BOOLS}),
    Case("Where", {0: BOOLS, 1: X, 2: _f(8)}),
    Case("Cast", {0: X * 3}, attributes={"to": TensorProto.INT32}),
    Case("Cast", {0: _i(1, 0, 2)}, attributes={"to": TensorProto.BOOL}),
    Case("Constant", {}, attributes={"value": numpy_helper.from_array(_f(2, 2))}),
    Case("ConstantOfShape", {}, {0: _i(2, 3)}, {"value": numpy_helper.from_array(_f(1))}),
    Case("Gelu", {0: X}),
    Case("Gelu", {0: X}, attributes={"approximate": "tanh"}),
    Case("LeakyRelu", {0: X}, attributes={"alpha": 0.2}),
    Case("Softmax", {0: X}, attributes={"axis": 1}),
    Case("Clip", {0: X}, {1: np.float32(-0.5), 2: np.float32(0.5)}),
    Case("Clip", {0: X}, {1: np.float32(-0.5)}),
    Case("MatMul", {0: X, 1: _f(8, 5)}),
    Case("MatMul", {0: X}, {1: _f(8, 5)}),
    Case("MatMul", {0: _f(2, 3, 4, 8)}, {1: _f(2, 3, 8, 4)}),
    Case("MatMul", {1: _f(8, 5)}, {0: _f(4, 8)}),
    Case("Gemm", {0: _f(3, 8)}, {1: _f(8, 5), 2: _f(5)}),
    Case("Gemm", {0: _f(3, 8)}, {1: _f(5, 8)}, {"transB": 1}),
    Case("Gemm", {0: _f(3, 8), 1: _f(8, 5), 2: _f(5)}),
    Case("Shape", {0: X}, attributes={"start": 1, "end": 3}),
    Case("Gather", {1: _i([0, 2], [1, 1])}, {0: _f(4, 5)}),
    Case("Gather", {0: X}, {1: _i([2, 0])}, {"axis": 1}),
    Case("Gather", {0: X}, {1: np.asarray(1, np.int64)}, {"axis": 0}),
    Case("GatherND", {0: X}, {1: _i([0, 1], [1, 2])}),
    Case("Range", {}, {0: np.asarray(2, np.int64), 1: np.asarray(9, np.int64), 2: np.asarray(3, np.int64)}),
    Case("Slice", {0: X}, {1: _i(1, -5), 2: _i(3, 2**40), 3: _i(1, 2), 4: _i(1, 2)}),
    Case("Slice", {0: X}, {1: _i(1), 2: _i(2)}),
    Case("Split", {0: X}, {1: _i(3, 5)}, {"axis": -1}, outputs=2),
    Case("Split", {0: X}, attributes={"axis": 2, "num_outputs": 3}, outputs=3),
    Case("Concat", {0: X, 1: _f(2, 3, 2)}, attributes={"axis": -1}),
    Case("Reshape", {0: X}, {1: _i(0, -1, 4)}),
    Case("Flatten", {0: X}, attributes={"axis": 2}),
    Case("Transpose", {0: X}, attributes={"perm": [2, 0, 1]}),
    Case("Transpose", {0: X}),
    Case("Squeeze", {0: _f(1, 3, 1)}, {1: _i(0)}),
    Case("Squeeze", {0: _f(1, 3, 1)}),
    Case("Unsqueeze", {0: X}, {1: _i(0, -1)}),
    Case("Expand", {0: _f(3, 1)}, {1: _i(2, 1, 4)}),
    Case("Tile", {0: X}, {1: _i(1, 2, 2)}),
    Case("Pad", {0: X}, {1: _i(0, 1, 2, 0, 0, 3), 2: np.float32(1.5)}),
    Case("Pad", {0: X}, {1: _i(1, 2), 2: np.float32(0), 3: _i(-1)}),
    *(Case(op, {0: X}, {1: _i(1)}, {"keepdims": 0}) for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin")),
    Case("ReduceSum", {0: X}, attributes={"noop_with_empty_axes": 1}),
    Case("ReduceMean", {0: X}),
    Case("ArgMax", {0: X}, attributes={"axis": 1, "keepdims": 0}),
    Case("CumSum", {0: X}, {1: np.asarray(1, np.int64)}),
    Case("Trilu", {0: X}, {1: np.asarray(1, np.int64)}),
    Case("Trilu", {0: X}, attributes={"upper": 0}),
    Case("LayerNormalization", NORM | {2: _f(8)}, attributes={"epsilon": 1e-3}),
    Case("LayerNormalization", NORM),
    Case("SimplifiedLayerNormalization", NORM, attributes={"epsilon": 1e-3}),
    Case("RMSNormalization", NORM, attributes={"epsilon": 1e-3}),
    Case(
        "BatchNormalization", {0: PICTURE, 1: _f(4), 2: _f(4), 3: _f(4), 4: np.abs(_f(4))}, attributes={"epsilon": 1e-3}
    ),
    Case("Conv", {0: PICTURE}, {1: _f(6, 2, 3, 3), 2: _f(6)}, {"group": 2, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("Conv", {0: PICTURE, 1: _f(6, 4, 3, 3)}, attributes={"pads": [0, 1, 2, 1], "dilations": [2, 2]}),
    Case("Conv", {0: PICTURE}, {1: _f(6, 4, 4, 4)}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", {0: _f(1, 4, 9)}, {1: _f(6, 4, 3)}, {"pads": [1, 1]}),
    Case("MaxPool", {0: PICTURE}, attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("MaxPool", {0: PICTURE}, attributes={"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    Case("AveragePool", {0: PICTURE}, attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Case("AveragePool", {0: PICTURE}, attributes={"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case("GlobalAveragePool", {0: PICTURE}),
    Case("FusedMatMul", {0: X, 1: _f(2, 5, 8)}, attributes={"transB": 1, "alpha": 0.5}, domain=MS),
    Case("QuickGelu", {0: X}, attributes={"alpha": 1.702}, domain=MS),
    Case("BiasGelu", {0: X, 1: _f(8)}, domain=MS),
    Case("FastGelu", {0: X, 1: _f(8)}, domain=MS, tolerance=1e-5),
    Case("SkipLayerNormalization", {0: X, 1: _f(2, 3, 8), 2: _f(8), 3: _f(8), 4: _f(8)}, domain=MS, outputs=4),
    Case("SkipSimplifiedLayerNormalization", {0: X, 1: _f(2, 3, 8), 2: _f(8)}, domain=MS, outputs=4),
    Case(
        "MatMulNBits",
        {0: _f(2, 3, 40)},
        {1: _codes(6, 2, 16), 2: np.abs(_f(12)), 3: _codes(6, 1)},
        {"K": 40, "N": 6, "bits": 4, "block_size": 32},
        MS,
        tolerance=1e-5,
    ),
    Case(
        "MatMulNBits",
        {0: _f(2, 3, 40)},
        {1: _codes(6, 2, 32), 2: np.abs(_f(12)), 5: _f(6)},
        {"K": 40, "N": 6, "bits": 8, "block_size": 32},
        MS,
        tolerance=1e-5,
    ),
    Case(
        "GatherBlockQuantized",
        {1: _i([0, 3], [2, 2])},
        {0: _codes(4, 64), 2: np.abs(_f(4, 2))},
        {"bits": 8, "block_size": 32, "gather_axis": 0, "quantize_axis": 1},
        MS,
    ),
    Case(
        "GatherBlockQuantized",
        {1: _i([0, 3], [2, 2])},
        {0: _codes(4, 32), 2: np.abs(_f(4, 2)), 3: _codes(4, 1)},
        {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1},
        MS,
    ),
    *(
        Case(
            "RotaryEmbedding",
            {0: x, 1: _i([3, 4, 5], [0, 1, 2])},
            {2: _f(9, 4), 3: _f(9, 4)},
            {"interleaved": interleaved, "num_heads": heads},
            MS,
        )
        for interleaved in (0, 1)
        for x, heads in ((_f(2, 3, 16), 2), (_f(2, 2, 3, 8), 0))
    ),
    Case("RotaryEmbedding", {0: _f(2, 3, 16), 1: _i(4)}, {2: _f(9, 4), 3: _f(9, 4)}, {}, MS),
    Case("MultiHeadAttention", {0: _f(2, 3, 8), 1: _f(2, 4, 8), 2: _f(2, 4, 8)}, {}, {"num_heads": 2}, MS),
    Case(
        "MultiHeadAttention",
        {0: _f(2, 3, 8), 1: _f(2, 4, 8), 2: _f(2, 4, 8), 5: _f(2, 1, 3, 4)},
        {},
        {"num_heads": 2, "scale": 0.3},
        MS,
    ),
]


def _model(case: Case, folder: Path) -> Path:
    names = [
        f"x{i}" if i in case.fed or i in case.held else "" for i in range(1 + max([*case.fed, *case.held], default=-1))
    ]
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, domain=case.domain, **case.attributes)
    inputs = [
        helper.make_tensor_value_info(f"x{i}", helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for i, v in case.fed.items()
    ]
    held = [numpy_helper.from_array(np.asarray(v), f"x{i}") for i, v in case.held.items()]
    infos = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs if _given(case, name)]
    for info in infos:
        info.ClearField("type")
    graph = helper.make_graph([node], case.op, inputs, infos, initializer=held)
    opsets = [helper.make_opsetid("", 23 if case.op == "RMSNormalization" else 21), helper.make_opsetid(MS, 1)]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def _given(case: Case, name: str) -> bool:
    """Outputs for training are written by neither."""
    return not (case.op.startswith("Skip") and name in ("y1", "y2"))


def _network(case: Case, path: Path) -> Network:
    return Network(
        read_graph(path), {f"x{i}": torch.from_numpy(np.asarray(v)) for i, v in case.fed.items()}, {}, Weights()
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gives_what_onnx_runtime_gives(case: Case, tmp_path: Path) -> None:
    path = _model(case, tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = session.run(None, {f"x{i}": np.asarray(v) for i, v in case.fed.items()})
    network = _network(case, path)
    with torch.no_grad():
        got = network(*network.examples)
    assert len(got) == len(wanted) > 0
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.numpy().dtype == theirs.dtype
        assert ours.shape == theirs.shape
        scale = max(1.0, float(np.abs(theirs.astype(np.float64)).max(initial=0)))
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=case.tolerance * scale)


def test_every_operator_is_compared() -> None:
    compared = {(case.domain, case.op) for case in CASES} | {(MS, "GroupQueryAttention")}  # test_attention.py
    assert compared == set(OPERATORS)


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"the operator HardSwish \(node ''\)"):
        _network(Case("HardSwish", {0: X}), _model(Case("HardSwish", {0: X}), tmp_path))


def test_an_attribute_that_would_change_the_result_is_refused(tmp_path: Path) -> None:
    case = Case("CumSum", {0: X}, {1: np.asarray(1, np.int64)}, {"reverse": 1})
    with pytest.raises(ConversionError, match="reverse = 1"):
        _network(case, _model(case, tmp_path))


def test_a_shape_that_is_known_in_a_run_alone_is_refused(tmp_path: Path) -> None:
    case = Case("Reshape", {0: X, 1: _i(-1)})
    with pytest.raises(ConversionError, match="decides about shapes"):
        _network(case, _model(case, tmp_path))
