"""What an export says of its decoder, and what a session reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DecoderSpec:
    """What a loop over a decoder needs to know: the manifest's `generation` record.

    cache_layers, cache_heads, cache_head_dim: shape of the self-attention cache, [batch, heads, length, dim] each
    cross_layers: layers of the cross-attention cache that the encoder graph returns (0 for a decoder-only model)
    max_length: the longest sequence, in tokens
    shared_cache: the cache may be updated in place (GroupQueryAttention); otherwise it grows by concatenation
    eos_token_ids: tokens that end a text; decoder_start_token_ids: what an encoder-decoder model's text starts with
    cache_dtype: what the cache holds: keys and values as they are, or int8 codes of them
    cache_scales: with int8, where the codes' scales begin in the weights file, in bytes; None before they are written
    """

    cache_layers: int
    cache_heads: int
    cache_head_dim: int
    cross_layers: int
    max_length: int
    vocab_size: int
    shared_cache: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None = None
    decoder_start_token_ids: tuple[int, ...] = ()
    cache_dtype: Literal["float32", "int8"] = "float32"
    cache_scales: int | None = None

    @property
    def cache_names(self) -> tuple[str, ...]:
        """The part of a cache tensor's name that its past and its present share: "0.key", "0.value", ..."""
        return tuple(f"{layer}.{part}" for layer in range(self.cache_layers) for part in ("key", "value"))

    @property
    def cache_bytes_per_token(self) -> int:
        """How much memory the self-attention cache takes for one token of one text."""
        numbers = 2 * self.cache_layers * self.cache_heads * self.cache_head_dim
        return numbers * (1 if self.cache_dtype == "int8" else 4)

    @property
    def cross_names(self) -> tuple[str, ...]:
        """Names of the cross-attention tensors, outputs of the encoder and inputs of the decoder."""
        return tuple(f"cross.{layer}.{part}" for layer in range(self.cross_layers) for part in ("key", "value"))
