"""docs/formats/bundle-1.md says what the code does."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate
from edgeadapt.bundle import adapter_json, golden, manifest, rules, stored
from edgeadapt.bundle.bind import bind
from edgeadapt.bundle.write import write_adapter, write_manifest
from edgeadapt.decoder_spec import DecoderSpec


@pytest.fixture(scope="module")
def text(root):
    return (root / "docs" / "formats" / "bundle-1.md").read_text()


@pytest.mark.parametrize(
    "cls",
    [
        manifest.Manifest,
        manifest.BaseRecord,
        manifest.BaseModule,
        manifest.GraphRecord,
        manifest.Slot,
        manifest.ParameterSlot,
        manifest.AdapterRecord,
        manifest.Pruning,
        manifest.Blend,
        manifest.BlendPart,
        manifest.FileRecord,
        DecoderSpec,
        adapter_json.AdapterJson,
        adapter_json.TensorRecord,
    ],
)
def test_every_field_is_in_the_text(text, cls):
    missing = [field.name for field in dataclasses.fields(cls) if f"`{field.name}`" not in text]
    assert missing == []


def test_the_fixed_words_are_in_the_text(text):
    for word in (manifest.SCHEMA, adapter_json.SCHEMA, golden.SCHEMA):
        assert f'`"{word}"`' in text
    for word in (*rules.TERMS, *rules.ROLES, *rules.MODULE_TYPES, *stored.DTYPES):
        assert f"`{word}`" in text


def _slots_graph() -> onnx.ModelProto:
    """logits = x W + (x A) B, with W = 1 and rank 0 by default."""
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["base"]),
        helper.make_node("MatMul", ["x", "layer.q.lora_A"], ["middle"]),
        helper.make_node("MatMul", ["middle", "layer.q.lora_B"], ["change"]),
        helper.make_node("Add", ["base", "change"], ["logits"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 4]), ("layer.q.lora_A", [4, "r"]), ("layer.q.lora_B", ["r", 6]))
    ]
    initializers = [
        helper.make_tensor("W", TensorProto.FLOAT, [4, 6], [1.0] * 24),
        helper.make_tensor("layer.q.lora_A", TensorProto.FLOAT, [4, 0], []),
        helper.make_tensor("layer.q.lora_B", TensorProto.FLOAT, [0, 6], []),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 6])]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_the_app_in_a_few_lines(tmp_path, text, manifest, make_adapter, record, golden):
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 20
    slots = dataclasses.replace(manifest.slots[0], inputs={"a": "layer.q.lora_A", "b": "layer.q.lora_B"})
    manifest = dataclasses.replace(manifest, slots=(slots,), parameters=())
    full = make_adapter().sites["layer.q"]
    adapter = ResolvedAdapter("support", "lora", {"layer.q": SiteUpdate(full.a, full.b)}, {})
    (tmp_path / "graph").mkdir()
    for path in ("graph/model.plain.onnx", "graph/model.slots.onnx"):
        onnx.save(_slots_graph(), tmp_path / path)
    fingerprint = manifest.base.fingerprint
    record = write_adapter(
        tmp_path, "support", bind(adapter, manifest), record, golden, "float16", base_fingerprint=fingerprint
    )
    write_manifest(tmp_path, dataclasses.replace(manifest, adapters={"support": record}))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    names = {"folder": str(tmp_path), "name": "support", "inputs": {"x": x}}
    exec(code, names)  # noqa: S102 - the text's own example
    np.testing.assert_array_equal(names["base"][0], x @ np.ones((4, 6), np.float32))
    np.testing.assert_allclose(names["adapted"][0], x @ (1 + full.a @ full.b), rtol=1e-2, atol=2e-2)
    assert np.abs(names["adapted"][0] - names["base"][0]).max() > 1
