"""Encoder-decoder models (T5, Whisper): one graph for the encoder, one for a decoder step.

The encoder graph also returns the cross-attention keys and values of every decoder layer, so that a decoder step never
computes them again; adapters on those projections therefore act in the encoder graph. The cache that transformers'
own code fills is what is exported: nothing here knows an architecture.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.export.trace import Trace
from edgeadapt.merging.base_model import BaseModel

ORDER = 3
TASKS = ("text2text-generation", "automatic-speech-recognition")
DEFAULT_MAX_LENGTH = 1024


def claims(base: BaseModel) -> bool:
    """Return whether `base` generates text from an encoder's output."""
    return base.task in TASKS and bool(getattr(base.config, "is_encoder_decoder", False))


def generation(base: BaseModel) -> DecoderSpec:
    """Return the caches' shapes and the tokens that start and end a text."""
    config = base.config
    settings: Any = base.module.generation_config
    layers, heads, dim = _decoder_shape(base)
    eos = settings.eos_token_id if settings.eos_token_id is not None else config.eos_token_id
    start = settings.decoder_start_token_id
    start = config.decoder_start_token_id if start is None else start
    forced = [token for _, token in sorted(getattr(settings, "forced_decoder_ids", None) or []) if token is not None]
    limit = base.max_length or getattr(config, "max_target_positions", None) or DEFAULT_MAX_LENGTH
    return DecoderSpec(
        cache_layers=layers,
        cache_heads=heads,
        cache_head_dim=dim,
        cross_layers=layers,
        max_length=int(limit),
        vocab_size=config.vocab_size,
        shared_cache=False,
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        pad_token_id=config.pad_token_id,
        decoder_start_token_ids=() if start is None else (start, *forced),
    )


def traces(base: BaseModel) -> dict[str, Trace]:
    """Return the traces of roles "encoder" and "decoder"."""
    speech = base.task == "automatic-speech-recognition"
    layers, heads, dim = _decoder_shape(base)
    return {
        "encoder": _encoder_trace(base, layers, speech),
        "decoder": _decoder_trace(base, layers, heads, dim, speech),
    }


def _decoder_shape(base: BaseModel) -> tuple[int, int, int]:
    config = base.config
    layers = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None) or config.num_layers
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    dim = getattr(config, "d_kv", None) or config.d_model // heads
    return int(layers), int(heads), int(dim)


def _example_encoder(base: BaseModel, speech: bool) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    if speech:
        frames = 2 * base.config.max_source_positions
        features = torch.zeros(2, base.config.num_mel_bins, frames)
        return {"input_features": features}, {"input_features": {0: "batch"}}
    ids = torch.zeros((2, 7), dtype=torch.int64)
    axes = {0: "batch", 1: "encoder_length"}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": axes, "attention_mask": axes}


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


class _Encoder(torch.nn.Module):
    """Encoder inputs -> encoder_last_hidden_state, cross keys and values of every decoder layer."""

    def __init__(self, base: BaseModel, names: tuple[str, ...], layers: int) -> None:
        super().__init__()
        self.module = base.module
        self.names = names
        self.layers = layers

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = dict(zip(self.names, args, strict=True))
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # One decoder step on a dummy token fills the cross-attention cache; all else of it is dead code in the graph.
        token = torch.zeros((args[0].shape[0], 1), dtype=torch.int64)
        result = self.module(**inputs, decoder_input_ids=token, past_key_values=cache, use_cache=True)
        cross = [t for layer in cache.cross_attention_cache.layers for t in (layer.keys, layer.values)]
        return (result.encoder_last_hidden_state, *cross)


def _encoder_trace(base: BaseModel, layers: int, speech: bool) -> Trace:
    inputs, axes = _example_encoder(base, speech)
    cross = _cache_names("cross", layers)
    length: dict[int, str] = {} if speech else {1: "encoder_length"}
    cross_axes: dict[int, str] = {0: "batch"} if speech else {0: "batch", 2: "encoder_length"}
    return Trace(
        _Encoder(base, tuple(inputs), layers),
        inputs,
        axes,
        ("encoder_last_hidden_state", *cross),
        {"encoder_last_hidden_state": {0: "batch", **length}, **dict.fromkeys(cross, cross_axes)},
    )


class _Decoder(torch.nn.Module):
    """decoder_input_ids, [encoder_attention_mask], cross..., past... -> logits, present..."""

    def __init__(self, base: BaseModel, masked: bool) -> None:
        super().__init__()
        self.module = base.module
        self.masked = masked
        self.width = int(base.config.d_model)

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ids, rest = args[0], list(args[1:])
        mask = rest.pop(0) if self.masked else None
        cross, past = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        cache = EncoderDecoderCache(_filled(past), _filled(cross))
        cache.is_updated = dict.fromkeys(range(len(past) // 2), True)
        seen = past[0].shape[2]
        # The encoder's states are read only for their length here: keys and values come from the cache.
        hidden = torch.zeros(ids.shape[0], cross[0].shape[2], self.width)
        arguments: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        result = self.module(
            encoder_outputs=(hidden,),
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            cache_position=torch.arange(ids.shape[1]) + seen,
            **arguments,
        )
        present = [t for layer in cache.self_attention_cache.layers for t in (layer.keys, layer.values)]
        return (result.logits, *present)


def _filled(tensors: list[torch.Tensor]) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(len(tensors) // 2):
        cache.update(tensors[2 * layer], tensors[2 * layer + 1], layer)
    return cache


def _decoder_trace(base: BaseModel, layers: int, heads: int, dim: int, speech: bool) -> Trace:
    batch, seq, past, source = 2, 3, 5, base.config.max_source_positions if speech else 7
    inputs: dict[str, torch.Tensor] = {"decoder_input_ids": torch.zeros((batch, seq), dtype=torch.int64)}
    axes: dict[str, dict[int, str]] = {"decoder_input_ids": {0: "batch", 1: "sequence"}}
    if not speech:
        inputs["encoder_attention_mask"] = torch.ones((batch, source), dtype=torch.int64)
        axes["encoder_attention_mask"] = {0: "batch", 1: "encoder_length"}
    for name in _cache_names("cross", layers):
        inputs[name] = torch.zeros(batch, heads, source, dim)
        axes[name] = {0: "batch"} if speech else {0: "batch", 2: "encoder_length"}
    outputs = ["logits"]
    output_axes: dict[str, dict[int, str]] = {"logits": {0: "batch", 1: "sequence"}}
    for name in _cache_names("past_key_values", layers):
        inputs[name] = torch.zeros(batch, heads, past, dim)
        axes[name] = {0: "batch", 2: "past_sequence"}
    for name in _cache_names("present", layers):
        outputs.append(name)
        output_axes[name] = {0: "batch", 2: "total_sequence"}
    return Trace(_Decoder(base, not speech), inputs, axes, tuple(outputs), output_axes)
