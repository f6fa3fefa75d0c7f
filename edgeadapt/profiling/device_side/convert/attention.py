"""Attention of com.microsoft, and rotary embeddings.

A decoder's keys and values come in as a cache of fixed length of which the first `past` are valid, and what a step adds
goes out alone, float32[batch, heads, tokens, dim]: whoever runs the model writes it into the cache at its place. So no
runtime copies a cache through its graph, and none needs to update memory in place.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .graph import ConversionError, Node
from .operator_table import MICROSOFT, Tensor, operator, refuse_attributes

HIDDEN = -1e9
"""What is added to a score that must not count."""


@operator("RotaryEmbedding", domain=MICROSOFT)
def _rotary(node: Node, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate float32[batch, heads, tokens, dim], or [batch, tokens, heads * dim] where the heads' number is given."""
    names = ("interleaved", "num_heads", "rotary_embedding_dim", "scale", "is_packed_batching")
    refuse_attributes(node, {**dict.fromkeys(names[:3], ...), "scale": 1.0, "is_packed_batching": 0})
    tokens = x.shape[-2] if x.ndim == 4 else x.shape[1]
    if positions.numel() == 1:  # where the first token lies
        positions = positions.reshape(1, 1) + torch.arange(tokens, device=x.device).reshape(1, -1)
    flat = x.ndim == 3
    if flat:
        heads = node.get("num_heads", 0) or x.shape[2] // (2 * cos.shape[1])
        x = x.reshape(x.shape[0], tokens, heads, -1).transpose(1, 2)
    dim = node.get("rotary_embedding_dim", 0) or x.shape[-1]
    rotated = rotate(x, positions, cos, sin, dim, interleaved=bool(node.get("interleaved", 0)))
    return rotated.transpose(1, 2).reshape(x.shape[0], tokens, -1) if flat else rotated


def rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, dim: int, *, interleaved: bool) -> Tensor:
    """Return x float32[batch, heads, tokens, head dim] with its first `dim` numbers rotated.

    Args:
        x: what is rotated.
        positions: int[batch or 1, tokens].
        cos: float32[positions, dim / 2], and sin alike.
        sin: see cos.
        dim: how many numbers of a head are rotated.
        interleaved: pairs are neighbours, else the two halves.
    """
    rows, tokens = positions.shape
    flat = positions.reshape(-1)
    c, s = (torch.index_select(t, 0, flat).reshape(rows, 1, tokens, -1) for t in (cos, sin))
    kept, rest = x[..., :dim], x[..., dim:]
    if interleaved:
        first, second = kept[..., ::2], kept[..., 1::2]
        turned = torch.stack([first * c - second * s, second * c + first * s], dim=-1).reshape(kept.shape)
    else:
        first, second = kept[..., : dim // 2], kept[..., dim // 2 :]
        turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)


@operator("MultiHeadAttention", domain=MICROSOFT)
def _multi_head(node: Node, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None) -> Tensor:
    """Attend over [batch, tokens, heads * dim]; `rest`: bias, padding mask, attention bias, past (refused)."""
    refuse_attributes(node, {"num_heads": ..., "scale": ..., "mask_filter_value": ..., "unidirectional": 0})
    bias, padding, added = (rest + (None,) * 3)[:3]
    if bias is not None or padding is not None or any(item is not None for item in rest[3:]):
        raise ConversionError(
            f"MultiHeadAttention (node {node.name!r}) has a bias, a padding mask or a past of its own",
            hint="profile this bundle with a runtime that reads ONNX (onnxruntime, openvino)",
        )
    heads = node.get("num_heads")
    q, k, v = (t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (query, key, value))
    scale = node.get("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if added is not None:
        scores = scores + added
    found = torch.matmul(torch.softmax(scores, -1), v)
    return found.transpose(1, 2).reshape(query.shape[0], query.shape[1], -1)


_KNOWN = ("num_heads", "kv_num_heads", "scale", "do_rotary", "rotary_interleaved", "local_window_size", "softcap")


@operator("GroupQueryAttention", domain=MICROSOFT)
def _group_query(node: Node, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention [batch, tokens, heads * dim] and the new keys and values [batch, heads, tokens, dim].

    The inputs: query [batch, tokens, heads * dim], with keys and values behind it where those are left out; key and
    value [batch, tokens, kv heads * dim]; past key and value [batch, kv heads, capacity, dim], of capacity 0 for what
    begins a text; int[batch], the position of a row's last token; how long the longest row is, which is not looked at;
    cos and sin [positions, rotary dim / 2]. Position ids, biases and sinks are refused.
    """
    query, key, value, past_key, past_value, last, _ = inputs[:7]
    rest = inputs[7:]
    assert query is not None
    assert last is not None
    refuse_attributes(
        node,
        {
            **dict.fromkeys(_KNOWN, ...),
            "smooth_softmax": 0,
            "qk_output": 0,
            "kv_cache_bit_width": 0,
            "k_quant_type": "NONE",
            "v_quant_type": "NONE",
        },
    )
    if any(item is not None for item in rest[2:]):
        raise ConversionError(
            f"GroupQueryAttention (node {node.name!r}) has position ids, a bias, a sink or scales of a quantized cache",
            hint="profile this bundle with a runtime that reads ONNX (onnxruntime, openvino)",
        )
    heads, groups = node.get("num_heads"), node.get("kv_num_heads")
    batch, tokens = query.shape[0], query.shape[1]
    if key is None or value is None:
        dim = query.shape[2] // (heads + 2 * groups)
        query, key, value = torch.split(query, [heads * dim, groups * dim, groups * dim], dim=-1)
    q, k, v = (
        t.reshape(batch, tokens, n, -1).transpose(1, 2) for t, n in ((query, heads), (key, groups), (value, groups))
    )
    past = last.reshape(-1, 1) - (tokens - 1)
    if node.get("do_rotary", 0):
        cos, sin = rest[0], rest[1]
        assert cos is not None
        assert sin is not None
        positions = past + torch.arange(tokens, dtype=past.dtype, device=past.device).reshape(1, -1)
        dim, interleaved = 2 * cos.shape[1], bool(node.get("rotary_interleaved", 0))
        q, k = (rotate(t, positions, cos, sin, dim, interleaved=interleaved) for t in (q, k))
    found = _attend(node, (q, k, v), (past_key, past_value), past)
    return found.transpose(1, 2).reshape(batch, tokens, -1), k, v


def _attend(
    node: Node, new: tuple[Tensor, Tensor, Tensor], cache: tuple[Tensor | None, Tensor | None], past: Tensor
) -> Tensor:
    """Return float32[batch, heads, tokens, dim] of queries, keys and values; heads that share keys are one product."""
    q, k, v = new
    past_key, past_value = cache
    assert past_key is not None
    assert past_value is not None
    batch, heads, tokens, dim = q.shape
    groups, window = k.shape[1], node.get("local_window_size", -1)
    capacity = past_key.shape[2]
    rows = torch.arange(tokens, device=q.device).repeat(heads // groups)  # the token of each row of a product
    grouped = q.reshape(batch, groups, -1, dim) * (node.get("scale", 0.0) or 1 / math.sqrt(dim))
    scores = [_capped(node, torch.matmul(grouped, k.transpose(-1, -2))) + _among_new(rows, tokens, window)]
    if capacity:
        old = _capped(node, torch.matmul(grouped, past_key.transpose(-1, -2)))
        scores.insert(0, old + _of_past(rows, capacity, past, window))
    weights = torch.softmax(torch.cat(scores, -1) if capacity else scores[0], -1)
    found = torch.matmul(weights[..., capacity:], v)
    if capacity:
        found = found + torch.matmul(weights[..., :capacity], past_value)
    return found.reshape(batch, heads, tokens, dim)


def _capped(node: Node, scores: Tensor) -> Tensor:
    cap = node.get("softcap", 0.0)
    return torch.tanh(scores / cap) * cap if cap else scores


def _among_new(rows: Tensor, tokens: int, window: int) -> Tensor:
    """Return float32[rows, tokens]: 0 for a token that the row's may look at, the rest hidden."""
    places = torch.arange(tokens, device=rows.device).reshape(1, -1)
    seen = places <= rows.reshape(-1, 1)
    if window > 0:
        seen = seen & (places > rows.reshape(-1, 1) - window)
    return (~seen).to(torch.float32) * HIDDEN


def _of_past(rows: Tensor, capacity: int, past: Tensor, window: int) -> Any:
    """Return float32[batch, 1, 1 or rows, capacity]: 0 for what the cache holds and the row's token may look at."""
    places = torch.arange(capacity, dtype=past.dtype, device=past.device).reshape(1, 1, 1, -1)
    held = past.reshape(-1, 1, 1, 1)
    seen = places < held
    if window > 0:
        seen = seen & (places > held + rows.to(past.dtype).reshape(1, 1, -1, 1) - window)
    return (~seen).to(torch.float32) * HIDDEN
