from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import QuantizeError
from edgeadapt.export.graph import Graph
from edgeadapt.quantize.kv_cache import quantize_cache, scales_of
from edgeadapt.quantize.pack import pack

LAYERS, HEADS, DIM = 2, 2, 8
SPEC = DecoderSpec(LAYERS, HEADS, DIM, 0, 16, 32, shared_cache=True, eos_token_ids=())


def _graph(attention: str = "GroupQueryAttention") -> Graph:
    """A decoder of nothing but attention."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, "com.microsoft": 1}, name="g")

    def value(name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

    x = value("x", ["batch", "seq", HEADS * DIM])
    counts = [value("seqlens", ["batch"], ir.DataType.INT32), value("total", [], ir.DataType.INT32)]
    graph.inputs.extend([x, *counts])
    for layer in range(LAYERS):
        past = [value(f"past_key_values.{layer}.{part}", ["batch", HEADS, "past", DIM]) for part in ("key", "value")]
        graph.inputs.extend(past)
        node = ir.node(
            attention,
            [x, x, x, *past, *counts],
            {"num_heads": HEADS, "kv_num_heads": HEADS},
            domain="com.microsoft",
            num_outputs=3,
        )
        for output, name in zip(
            node.outputs, (f"y{layer}", f"present.{layer}.key", f"present.{layer}.value"), strict=True
        ):
            output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
        graph.outputs.extend(node.outputs[1:])
        x = node.outputs[0]
    graph.outputs.append(x)
    return Graph({"decoder": ir.Model(graph, ir_version=10)}, "text-generation", SPEC)


def _scales() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: scales_of(generator.uniform(1, 2, (HEADS, DIM)).astype("f4")) for name in SPEC.cache_names}


def test_scales_leave_room_and_are_never_zero():
    scales = scales_of(np.array([[2.0, 0.0, 0.1], [0.1, 0.1, 0.1]], np.float32))
    assert (scales.shape, scales.dtype) == ((2, 1, 3), np.float32)
    rare = 1.1 * 0.1**0.9 * 2.0**0.1  # small beside its head's largest: surpassed more easily
    np.testing.assert_allclose(127 * scales[:, 0], [[2.2, 1e-6, rare], [0.11] * 3], rtol=1e-5)


def test_the_graph_takes_codes_and_the_original_stays_as_it_is():
    graph, scales = _graph(), _scales()
    quantized = quantize_cache(graph, scales)
    assert quantized.generation == dataclasses.replace(SPEC, cache_dtype="int8")
    assert graph.generation == SPEC
    for model, dtype, inputs in ((graph, ir.DataType.FLOAT, 7), (quantized, ir.DataType.INT8, 14)):
        decoder = model.models["decoder"].graph
        values = [v for v in (*decoder.inputs, *decoder.outputs) if v.name.startswith(("past_key", "present"))]
        assert len(values) == 4 * LAYERS
        assert {value.dtype for value in values} == {dtype}
        assert {len(node.inputs) for node in decoder} == {inputs}
    for layer, node in enumerate(quantized.models["decoder"].graph):
        for place, part in ((12, "key"), (13, "value")):
            np.testing.assert_array_equal(node.inputs[place].const_value.numpy(), scales[f"{layer}.{part}"])
        assert node.inputs[7:12] == (None,) * 5
        assert {name: attribute.value for name, attribute in node.attributes.items()} == {
            "num_heads": HEADS,
            "kv_num_heads": HEADS,
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
            "kv_cache_bit_width": 8,
        }


def test_scales_lie_in_the_weights_file_in_one_piece(tmp_path):
    scales = _scales()
    packed = pack(quantize_cache(_graph(), scales), tmp_path, (), {})
    count = 2 * LAYERS * HEADS * DIM
    found = np.fromfile(tmp_path / "graph" / "weights.bin", "<f4", count, offset=packed.cache_scales)
    np.testing.assert_array_equal(found, np.concatenate([scales[name].ravel() for name in SPEC.cache_names]))
    model = ir.load(tmp_path / "graph" / "decoder.plain.onnx")
    stored = {value.name: value.const_value for value in model.graph.initializers.values()}
    for place, name in enumerate(SPEC.cache_names):
        tensor = stored[f"kv_cache.{name}.scale"]
        assert isinstance(tensor, ir.ExternalTensor)
        assert (tensor.offset, tensor.length) == (packed.cache_scales + place * 4 * HEADS * DIM, 4 * HEADS * DIM)
    assert pack(_graph(), tmp_path / "float", (), {}).cache_scales is None


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            _graph("MultiHeadAttention"),
            "0 of 2 layers read their cache by GroupQueryAttention, the only operator that takes int8",
        ),
        (
            dataclasses.replace(_graph(), generation=dataclasses.replace(SPEC, shared_cache=False)),
            "this graph has no key-value cache that could be int8",
        ),
        (dataclasses.replace(_graph(), generation=None), "this graph has no key-value cache that could be int8"),
    ],
)
def test_other_caches_are_refused(graph, message):
    with pytest.raises(QuantizeError) as caught:
        quantize_cache(graph, _scales())
    assert str(caught.value) == f"{message}\nHint: leave out --kv-cache"
