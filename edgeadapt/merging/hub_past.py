"""AdapterHub's prefixes as the beginning of a key-value cache: what the library puts before a decoder's keys, rotated.

In the library a text begins at position 0 with or without a prefix, whose keys take part as they are. Behind a cache of
n tokens a text begins at position n. A rotation of all positions by n changes no product of a query and a key, so the
prefix's keys are rotated by n. A base that learns its positions has no such freedom.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeadapt.adapters.adapter import Adapter, Array
from edgeadapt.errors import AdapterError, MergeError
from edgeadapt.merging.adapterhub import NAME, hub_module, running
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.past import TOLERANCE, Layers, cache_of
from edgeadapt.merging.quiet import quiet

_PROBE_TOKENS = 6


def hub_past(base: BaseModel, adapter: Adapter, *, alone: bool) -> tuple[tuple[Array, Array], ...]:
    """Return the key and value of an adapter's prefix in each layer's cache, float32[heads, tokens, dim].

    Args:
        base: the base.
        adapter: the adapter as saved.
        alone: whether the prefix is all that the adapter does; then it is proven to be.

    Raises:
        AdapterError: if the base is no decoder-only language model, or its positions cannot be moved.
        MergeError: if the library cannot load the adapter, or the base with these keys is not what it computes.
    """
    if base.task != "text-generation" or getattr(base.config, "is_encoder_decoder", False):
        raise AdapterError(
            f"a prefix is held in the key-value cache of a decoder-only language model, and {base.name} for "
            f"{base.task} has none",
            hint="train LoRA or a bottleneck for this model",
        )
    rotary = next((module for path, module in base.module.named_modules() if path.endswith("rotary_emb")), None)
    if rotary is None:
        raise AdapterError(
            f"{base.name} learns its positions: behind a prefix in the cache a text has other ones than in AdapterHub, "
            "where it begins at position 0",
            hint="train prefix tuning with peft, or another adapter",
        )
    window, limit = (getattr(base.config, key, None) for key in ("sliding_window", "max_position_embeddings"))
    if window is not None and (limit is None or window < limit):
        raise AdapterError(
            f"{base.name} has a window of {window} tokens: AdapterHub's prefix is seen from everywhere, one in the "
            "cache is not",
            hint="train prefix tuning with peft, or another adapter",
        )
    module = hub_module(base, adapter)
    probe = torch.arange(_PROBE_TOKENS)[None] % int(base.config.vocab_size)
    with running(module):
        layers = _layers()
    tokens = int(layers[0][0].shape[2])
    with quiet(), torch.no_grad():
        layers = [(_rotated(key, rotary, tokens), value) for key, value in layers]
        if alone:
            _prove(base, module, layers, probe, adapter)
    return tuple((key[0].numpy().copy(), value[0].numpy().copy()) for key, value in layers)


def _layers() -> Layers:
    """Return the prefix's keys and values as the library has them, float32[1, heads, tokens, dim] per layer."""
    from adapters import ForwardContext

    states: dict[str, Any] = ForwardContext.get_context().prefix_states[NAME]
    if len(states) != 1:
        raise AdapterError(
            f"it has prefixes for {', '.join(sorted(states))}, a decoder has one", hint="train it on a decoder alone"
        )
    return [(layer[0], layer[1]) for layer in next(iter(states.values()))]


def _rotated(key: torch.Tensor, rotary: Any, tokens: int) -> torch.Tensor:
    """Return keys that a query at position p + tokens meets as the given ones are met at p."""
    cos, sin = rotary(key, torch.tensor([[tokens]]))
    scale = float(getattr(rotary, "attention_scaling", 1.0))
    size = cos.shape[-1]
    turned, rest = key[..., :size], key[..., size:]
    first, second = turned.chunk(2, dim=-1)
    half = torch.cat((-second, first), dim=-1)
    return torch.cat(((turned * cos[:, None] + half * sin[:, None]) / scale, rest), dim=-1).contiguous()


def _prove(base: BaseModel, module: nn.Module, layers: Layers, probe: torch.Tensor, adapter: Adapter) -> None:
    tokens = int(layers[0][0].shape[2])
    mask = torch.ones((1, tokens + _PROBE_TOKENS), dtype=torch.int64)
    expected = module(input_ids=probe, attention_mask=mask[:, tokens:], use_cache=False).logits
    found = base.module(input_ids=probe, attention_mask=mask, past_key_values=cache_of(layers)).logits
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise MergeError(
            f"adapter {adapter.name!r} does more than its keys and values: the library's own logits differ from the "
            f"base's with them by {error:.2g} of the largest",
            hint="please report the model's class and the adapter's configuration",
        )
