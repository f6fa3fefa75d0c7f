"""Graphs without optional inputs, against onnx's own reading of the same files."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeadapt.errors import ProfileError
from edgeadapt.profiling.required_inputs import require_inputs


def unread(name, offset, length):
    raise AssertionError((name, offset, length))


def model_of(defaults, nodes=(("Add", ["x", "bias"], ["y"]),)):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])]
    inputs += [helper.make_tensor_value_info(tensor.name, tensor.data_type, None) for tensor in defaults]
    weights = [numpy_helper.from_array(np.ones(3, np.float32), "weight")]
    made = [helper.make_node(kind, fed, given) for kind, fed, given in nodes]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])]
    graph = helper.make_graph(made, "g", inputs, outputs, initializer=[*weights, *defaults])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    "value",
    [
        np.asarray([1, -2, 3.5], np.float32),
        np.zeros((4, 0), np.float32),
        np.asarray([-5, 2**40], np.int64),
        np.asarray([[1], [2]], np.float16),
        np.asarray(7, np.int32),
    ],
)
def test_defaults_are_what_onnx_reads_and_the_rest_of_the_model_stays(value):
    model = model_of([numpy_helper.from_array(value, "bias")])
    data, defaults = require_inputs(model.SerializeToString(), unread)
    assert list(defaults) == ["bias"]
    assert (defaults["bias"].dtype, defaults["bias"].tolist()) == (value.dtype, value.tolist())
    assert defaults["bias"].shape == value.shape
    found = onnx.load_from_string(data)
    assert [tensor.name for tensor in found.graph.initializer] == ["weight"]
    del model.graph.initializer[1:]
    assert found == model


def test_values_outside_of_raw_data_are_read_too():
    floats = helper.make_tensor("bias", TensorProto.FLOAT, [2], [1.5, -2])
    whole = helper.make_tensor("from", TensorProto.INT64, [2], [-3, 9])
    assert not floats.raw_data
    assert not whole.raw_data
    found = require_inputs(model_of([floats, whole]).SerializeToString(), unread)[1]
    assert (found["bias"].tolist(), found["from"].tolist()) == ([1.5, -2], [-3, 9])


def test_a_default_in_the_weights_file_is_read_there():
    tensor = numpy_helper.from_array(np.asarray([1, 2, 3], np.float32), "bias")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", "offset": "64", "length": "12"}.items():
        tensor.external_data.add(key=key, value=value)
    asked = []

    def read(name, offset, length):
        asked.append((name, offset, length))
        return np.asarray([4, 5, 6], np.float32).tobytes()

    assert require_inputs(model_of([tensor]).SerializeToString(), read)[1]["bias"].tolist() == [4, 5, 6]
    assert asked == [("weights.bin", 64, 12)]


def test_the_model_computes_the_same_with_its_defaults_fed():
    model = model_of([numpy_helper.from_array(np.asarray([1, -2, 3], np.float32), "bias")])
    x = np.asarray([[1, 2, 3], [4, 5, 6]], np.float32)
    before = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    data, defaults = require_inputs(model.SerializeToString(), unread)
    session = onnxruntime.InferenceSession(data)
    assert [each.name for each in session.get_inputs()] == ["x", "bias"]
    assert session.run(None, {"x": x, **defaults})[0].tolist() == before.tolist()


@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda _: b"\xff" * 20, lambda _: b"", lambda _: b"PK\3\4"]
)
def test_what_is_no_model_is_refused(damage):
    data = model_of([numpy_helper.from_array(np.zeros(3, np.float32), "bias")]).SerializeToString()
    with pytest.raises(ProfileError, match="is not a valid ONNX file"):
        require_inputs(damage(data), unread)


def test_a_default_of_another_kind_or_length_is_refused_by_name():
    text = helper.make_tensor("bias", TensorProto.STRING, [1], [b"a"])
    with pytest.raises(ProfileError, match=r"graph input 'bias' cannot be read: it is of ONNX's type 8"):
        require_inputs(model_of([text]).SerializeToString(), unread)
    short = numpy_helper.from_array(np.zeros(3, np.float32), "bias")
    short.dims[0] = 4
    with pytest.raises(ProfileError, match=r"'bias' cannot be read: 12 bytes are not float32\[4\]"):
        require_inputs(model_of([short]).SerializeToString(), unread)
