"""Tiny ONNX graphs that honour the bundle's graph contract, made by hand, with numpy twins to compare with.

The weights are random but fixed by a seed. Every graph comes in two forms over one weights file: plain (no adapter
inputs) and slots (an optional low-rank pair at each linear layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
F, INT = TensorProto.FLOAT, TensorProto.INT64
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]


@dataclass
class GraphWriter:
    """Collects the nodes, weights and slots of one graph; `slots` says whether adapter inputs are wanted."""

    slots: bool
    weights: dict[str, Array]
    nodes: list[Any] = field(default_factory=list)
    slot_inputs: list[Any] = field(default_factory=list)
    defaults: list[Any] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    declare: bool = False  # whether adapter inputs declare their shape, so that all rows share one adapter

    def op(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output + "_node", domain=domain, **attributes))
        return output

    def constant(self, name: str, value: Array) -> str:
        self.constants[name] = value
        return name

    def linear(self, x: str, site: str) -> str:
        """Add y = x W^T (+ (x A) B); the weight is torch's float32[out, in]."""
        weight = self.weights[f"{site}.weight"]
        self.constants[f"{site}.weight_t"] = np.ascontiguousarray(weight.T)
        y = self.op("MatMul", [x, f"{site}.weight_t"], f"{site}.y")
        if not self.slots:
            return y
        a = self.slot(f"{site}.lora_A", np.zeros((weight.shape[1], 0), np.float32), [weight.shape[1], "rank"])
        b = self.slot(f"{site}.lora_B", np.zeros((0, weight.shape[0]), np.float32), ["rank", weight.shape[0]])
        xa = self.op("MatMul", [x, a], f"{site}.xa")
        xab = self.op("MatMul", [xa, b], f"{site}.xab")
        return self.op("Add", [y, xab], f"{site}.adapted")

    def slot(self, name: str, default: Array, shape: list[int | str]) -> str:
        self.slot_inputs.append(helper.make_tensor_value_info(name, F, shape if self.declare else None))
        self.defaults.append(numpy_helper.from_array(default, name))
        return name

    def model(self, inputs: list[Any], outputs: list[Any], weights_file: Path | None, offsets: dict[str, int]) -> Any:
        """Return the model; arrays of `constants` of 64 bytes or more become external data in `weights_file`."""
        initializers = []
        for name, value in self.constants.items():
            tensor = numpy_helper.from_array(value, name)
            if weights_file is not None and value.nbytes >= 64:
                if name not in offsets:
                    with weights_file.open("ab") as stream:
                        offsets[name] = stream.tell()
                        stream.write(value.tobytes())
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                place = {"location": weights_file.name, "offset": offsets[name], "length": value.nbytes}
                for key, item in place.items():
                    tensor.external_data.add(key=key, value=str(item))
            initializers.append(tensor)
        graph = helper.make_graph(
            self.nodes, "tiny", inputs + self.slot_inputs, outputs, initializer=initializers + self.defaults
        )
        return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)


@dataclass(frozen=True)
class DecoderShape:
    vocab: int = 300
    width: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    mlp: int = 48
    max_length: int = 64


def decoder_weights(shape: DecoderShape, seed: int) -> dict[str, Array]:
    """Random weights in torch's layout by parameter name, with the rotary tables."""
    rng = np.random.default_rng(seed)
    half = shape.head_dim // 2
    angle = np.arange(shape.max_length)[:, None] / 10.0 ** (np.arange(half)[None] / half)
    weights: dict[str, Array] = {
        "embed.weight": rng.normal(size=(shape.vocab, shape.width)),
        "norm.weight": 1 + 0.1 * rng.normal(size=shape.width),
        "lm_head.weight": rng.normal(size=(shape.vocab, shape.width)) * 0.5,
        "cos": np.cos(angle),
        "sin": np.sin(angle),
    }
    for site, (rows, columns) in decoder_sites(shape).items():
        weights.setdefault(f"{site}.weight", rng.normal(size=(rows, columns)) / np.sqrt(columns))
    return {name: value.astype(np.float32) for name, value in weights.items()}


def decoder_sites(shape: DecoderShape) -> dict[str, tuple[int, int]]:
    """Module path -> (out, in) of every linear layer with a slot."""
    sites = {}
    for i in range(shape.layers):
        sites[f"layers.{i}.q_proj"] = (shape.heads * shape.head_dim, shape.width)
        sites[f"layers.{i}.k_proj"] = (shape.kv_heads * shape.head_dim, shape.width)
        sites[f"layers.{i}.v_proj"] = (shape.kv_heads * shape.head_dim, shape.width)
        sites[f"layers.{i}.o_proj"] = (shape.width, shape.heads * shape.head_dim)
        sites[f"layers.{i}.up"] = (shape.mlp, shape.width)
        sites[f"layers.{i}.down"] = (shape.width, shape.mlp)
    sites["lm_head"] = (shape.vocab, shape.width)
    return sites


def decoder_model(
    shape: DecoderShape,
    weights: dict[str, Array],
    *,
    slots: bool,
    weights_file: Path | None,
    offsets: dict[str, int],
    declare: bool = False,
) -> Any:
    """A decoder with GroupQueryAttention (rotary inside), a tanh MLP and `logits_from`."""
    g = GraphWriter(slots, weights, declare=declare)
    g.constants.update({"embed.weight": weights["embed.weight"], "cos": weights["cos"], "sin": weights["sin"]})
    g.constant("norm.weight", weights["norm.weight"])
    g.constant("one_i32", np.asarray([1], np.int32))
    g.constant("axis1", np.asarray([1], np.int64))
    g.constant("end", np.asarray([2**62], np.int64))
    g.op("ReduceSum", ["attention_mask", "axis1"], "mask_sum", keepdims=0)
    g.op("Cast", ["mask_sum"], "mask_sum_i32", to=TensorProto.INT32)
    g.op("Sub", ["mask_sum_i32", "one_i32"], "seqlens_k")
    g.op("Shape", ["attention_mask"], "mask_total", start=1, end=2)
    g.op("Squeeze", ["mask_total"], "mask_total_scalar")
    g.op("Cast", ["mask_total_scalar"], "total", to=TensorProto.INT32)
    h = g.op("Gather", ["embed.weight", "input_ids"], "embedded")
    for i in range(shape.layers):
        h = _decoder_layer(g, shape, i, h)
    g.op("Slice", [h, "logits_from", "end", "axis1"], "kept")
    normed = g.op(
        "SimplifiedLayerNormalization", ["kept", "norm.weight"], "final_norm", axis=-1, epsilon=1e-5, stash_type=1
    )
    g.op("Identity", [g.linear(normed, "lm_head")], "logits")
    cache = [f"past_key_values.{i}.{k}" for i in range(shape.layers) for k in ("key", "value")]
    present = [f"present.{i}.{k}" for i in range(shape.layers) for k in ("key", "value")]
    kv = ["batch", shape.kv_heads, "past", shape.head_dim]
    g.defaults.append(numpy_helper.from_array(np.zeros(1, np.int64), "logits_from"))
    inputs = [
        helper.make_tensor_value_info("input_ids", INT, ["batch", "seq"]),
        helper.make_tensor_value_info("attention_mask", INT, ["batch", "total"]),
        *[helper.make_tensor_value_info(n, F, kv) for n in cache],
        helper.make_tensor_value_info("logits_from", INT, [1]),
    ]
    outputs = [helper.make_tensor_value_info("logits", F, ["batch", "kept", shape.vocab])]
    kv_out = ["batch", shape.kv_heads, "present", shape.head_dim]
    outputs += [helper.make_tensor_value_info(n, F, kv_out) for n in present]
    return g.model(inputs, outputs, weights_file, offsets)


def _decoder_layer(g: GraphWriter, shape: DecoderShape, i: int, h: str) -> str:
    p = f"layers.{i}"
    q, k, v = (g.linear(h, f"{p}.{n}") for n in ("q_proj", "k_proj", "v_proj"))
    g.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            [
                q,
                k,
                v,
                f"past_key_values.{i}.key",
                f"past_key_values.{i}.value",
                "seqlens_k",
                "total",
                "cos",
                "sin",
            ],
            [f"{p}.attention", f"present.{i}.key", f"present.{i}.value"],
            domain="com.microsoft",
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
            scale=float(shape.head_dim) ** -0.5,
        )
    )
    h = g.op("Add", [h, g.linear(f"{p}.attention", f"{p}.o_proj")], f"{p}.h1")
    up = g.op("Tanh", [g.linear(h, f"{p}.up")], f"{p}.tanh")
    return g.op("Add", [h, g.linear(up, f"{p}.down")], f"{p}.h2")


def decoder_reference(
    shape: DecoderShape, weights: dict[str, Array], ids: Array, adapter: Mapping[str, Array] | None = None
) -> Array:
    """The same decoder in float64 numpy, one row at a time without any cache: ids int64[seq] -> float64[seq, vocab]."""
    adapter = adapter or {}

    def linear(x: Array, site: str) -> Array:
        y: Array = x @ weights[f"{site}.weight"].astype(np.float64).T
        if f"{site}.lora_A" in adapter:
            y = y + (x @ adapter[f"{site}.lora_A"].astype(np.float64)) @ adapter[f"{site}.lora_B"]
        return y

    h = weights["embed.weight"][ids].astype(np.float64)
    for i in range(shape.layers):
        p = f"layers.{i}"
        q = _rotate(linear(h, f"{p}.q_proj"), weights, shape.heads)
        k = _rotate(linear(h, f"{p}.k_proj"), weights, shape.kv_heads)
        v = linear(h, f"{p}.v_proj").reshape(len(ids), shape.kv_heads, -1)
        group = shape.heads // shape.kv_heads
        k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * shape.head_dim**-0.5
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        attention = np.einsum("hqk,khd->qhd", weight, v).reshape(len(ids), -1)
        h = h + linear(attention, f"{p}.o_proj")
        h = h + linear(np.tanh(linear(h, f"{p}.up")), f"{p}.down")
    h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * weights["norm.weight"]
    return linear(h, "lm_head")


def _rotate(x: Array, weights: dict[str, Array], heads: int) -> Array:
    """Rotary embedding of the two-halves kind: x float64[seq, heads * dim] -> float64[seq, heads, dim]."""
    x = x.reshape(len(x), heads, -1)
    half = x.shape[-1] // 2
    cos, sin = weights["cos"][: len(x), None], weights["sin"][: len(x), None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def low_rank(sites: Mapping[str, tuple[int, int]], rank: int, seed: int, size: float = 0.3) -> dict[str, Array]:
    """A random adapter for `sites` (path -> (out, in)): graph input name -> float32 array."""
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for site, (rows, columns) in sites.items():
        found[f"{site}.lora_A"] = (rng.normal(size=(columns, rank)) * size / np.sqrt(columns)).astype(np.float32)
        found[f"{site}.lora_B"] = (rng.normal(size=(rank, rows)) / np.sqrt(rank)).astype(np.float32)
    return found


def save(model: Any, path: Path) -> None:
    """Write the model; its external data is already in place."""
    onnx.save(model, str(path))
