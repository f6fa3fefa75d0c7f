"""Attention of a decoder: a text read at once by ONNX Runtime; begun and continued over a fixed cache here."""

from __future__ import annotations

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

HEADS, GROUPS, DIM, ROOM, TEXT, PROMPT = 4, 2, 16, 12, 9, 5
Arrays = dict[str, Any]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.2},
    "rotary": {"do_rotary": 1},
    "interleaved": {"do_rotary": 1, "rotary_interleaved": 1},
    "window": {"do_rotary": 1, "local_window_size": 3},
    "softcap": {"softcap": 2.0},
}


def _write(folder: Path, attributes: dict[str, Any], *, packed: bool) -> Path:
    rng = np.random.default_rng(3)
    float_, int_ = TensorProto.FLOAT, TensorProto.INT64
    held = {
        "cos": rng.normal(size=(32, DIM // 2)).astype(np.float32),
        "sin": rng.normal(size=(32, DIM // 2)).astype(np.float32),
        "one": np.asarray(1, np.int64),
        "axis": np.asarray([1], np.int64),
    }
    rotary = ["cos", "sin"] if attributes.get("do_rotary") else []
    qkv = ["query", "", ""] if packed else ["query", "key", "value"]
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "axis"], ["sum"], keepdims=0),
        helper.make_node("Sub", ["sum", "one"], ["last64"]),
        helper.make_node("Cast", ["last64"], ["last"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["columns"], start=1, end=2),
        helper.make_node("Cast", ["columns"], ["columns32"], to=TensorProto.INT32),
        helper.make_node("Squeeze", ["columns32"], ["total"]),
        helper.make_node(
            "GroupQueryAttention",
            [*qkv, "past_key", "past_value", "last", "total", *rotary],
            ["found", "present_key", "present_value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=GROUPS,
            **attributes,
        ),
    ]
    wide, narrow = HEADS * DIM, GROUPS * DIM
    widths = {"query": wide + 2 * narrow} if packed else {"query": wide, "key": narrow, "value": narrow}
    inputs = [helper.make_tensor_value_info(name, float_, ["b", "s", width]) for name, width in widths.items()]
    inputs += [
        helper.make_tensor_value_info(name, float_, ["b", GROUPS, "p", DIM]) for name in ("past_key", "past_value")
    ]
    inputs.append(helper.make_tensor_value_info("attention_mask", int_, ["b", "t"]))
    outputs = [helper.make_tensor_value_info("found", float_, ["b", "s", wide])]
    outputs += [
        helper.make_tensor_value_info(f"present_{n}", float_, ["b", GROUPS, "t2", DIM]) for n in ("key", "value")
    ]
    graph = helper.make_graph(
        nodes, "attention", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in held.items()]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "attention.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def _torch(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def _run(network: Network, arrays: Arrays) -> Arrays:
    with torch.no_grad():
        found = network(*(torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in network.input_names))
    return dict(zip(network.output_names, (value.numpy() for value in found), strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_continued_over_a_fixed_cache(kind: str, packed: bool, tmp_path: Path) -> None:
    path = _write(tmp_path, KINDS[kind], packed=packed)
    rng = np.random.default_rng(1)
    wide, narrow = HEADS * DIM, GROUPS * DIM
    widths = {"query": wide + 2 * narrow} if packed else {"query": wide, "key": narrow, "value": narrow}
    text = {name: rng.normal(size=(2, TEXT, width)).astype(np.float32) for name, width in widths.items()}
    empty = {name: np.zeros((2, GROUPS, 0, DIM), np.float32) for name in ("past_key", "past_value")}
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = dict(
        zip(
            ("found", "present_key", "present_value"),
            session.run(None, {**text, **empty, "attention_mask": np.ones((2, TEXT), np.int64)}),
            strict=True,
        )
    )

    graph = read_graph(path)
    prompt = {name: np.ascontiguousarray(value[:, :PROMPT]) for name, value in text.items()}
    fixed = {**_torch(empty), "attention_mask": torch.ones((2, PROMPT), dtype=torch.int64)}
    begun = _run(Network(graph, _torch(prompt), fixed, Weights(), bound=PROMPT), prompt)
    np.testing.assert_allclose(begun["found"], wanted["found"][:, :PROMPT], rtol=0, atol=1e-5)

    # what lies beyond the valid part of a cache must not count
    cache = {name: np.full((2, GROUPS, ROOM, DIM), 7.0, np.float32) for name in empty}
    mask = np.ones((2, ROOM), np.int64)
    token = {name: np.ascontiguousarray(value[:, :1]) for name, value in text.items()}
    step = Network(graph, _torch({**token, **cache, "attention_mask": mask}), {}, Weights(), bound=ROOM)
    held = {"past_key": begun["present_key"], "past_value": begun["present_value"]}
    for name, value in held.items():
        cache[name][:, :, :PROMPT] = value
    for place in range(PROMPT, TEXT):
        mask[:] = np.arange(ROOM) <= place
        token = {name: value[:, place : place + 1] for name, value in text.items()}
        found = _run(step, {**token, **cache, "attention_mask": mask})
        np.testing.assert_allclose(found["found"], wanted["found"][:, place : place + 1], rtol=0, atol=1e-5)
        for part in ("key", "value"):
            np.testing.assert_allclose(
                found[f"present_{part}"], wanted[f"present_{part}"][:, :, place : place + 1], rtol=0, atol=1e-5
            )
            cache[f"past_{part}"][:, :, place : place + 1] = found[f"present_{part}"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_it_is_computed_where_its_inputs_are(kind: str, tmp_path: Path) -> None:
    """What an operator makes without saying where lies on the default device, here another one than the weights'."""
    shapes = {"query": (1, 1, HEADS * DIM), "key": (1, 1, GROUPS * DIM), "value": (1, 1, GROUPS * DIM)}
    shapes |= dict.fromkeys(("past_key", "past_value"), (1, GROUPS, ROOM, DIM))
    inputs = {name: torch.ones(shape) for name, shape in shapes.items()}
    inputs["attention_mask"] = torch.ones(1, ROOM, dtype=torch.int64)
    network = Network(read_graph(_write(tmp_path, KINDS[kind], packed=False)), inputs, {}, Weights(), bound=ROOM)
    with torch.no_grad():
        wanted = network(*network.examples)
        with torch.device("meta"):
            found = network(*network.examples)
    assert all(torch.equal(here, there) for here, there in zip(found, wanted, strict=True))


def test_what_attention_here_does_not_know_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, {"smooth_softmax": 1}, packed=True)
    inputs = {
        "query": torch.zeros(1, 2, (HEADS + 2 * GROUPS) * DIM),
        "past_key": torch.zeros(1, GROUPS, 3, DIM),
        "past_value": torch.zeros(1, GROUPS, 3, DIM),
        "attention_mask": torch.ones(1, 5, dtype=torch.int64),
    }
    with pytest.raises(ConversionError, match="smooth_softmax = 1"):
        Network(read_graph(path), inputs, {}, Weights())
