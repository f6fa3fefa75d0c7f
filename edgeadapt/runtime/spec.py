"""What a session must know of a bundle's decoder, read from the manifest."""

from __future__ import annotations

from dataclasses import dataclass, fields

from edgeadapt.bundle.manifest import Manifest
from edgeadapt.errors import SessionError
from edgeadapt.fields import from_mapping


@dataclass(frozen=True)
class DecoderSpec:
    """The manifest's `generation` record; the fields are those of `edgeadapt.export.graph.Generation`.

    cache_layers, cache_heads, cache_head_dim: shape of the self-attention cache, float32[batch, heads, length, dim]
    cross_layers: layers of the cross-attention cache that the encoder graph returns (0 for a decoder-only model)
    max_length: the longest sequence, in tokens
    shared_cache: the cache may be updated in place (GroupQueryAttention); otherwise it grows by concatenation
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

    @property
    def cache_names(self) -> tuple[str, ...]:
        """The part of a cache tensor's name that its past and its present share: "0.key", "0.value", ..."""
        return tuple(f"{layer}.{part}" for layer in range(self.cache_layers) for part in ("key", "value"))

    @property
    def cross_names(self) -> tuple[str, ...]:
        """Names of the cross-attention tensors, outputs of the encoder and inputs of the decoder."""
        return tuple(f"cross.{layer}.{part}" for layer in range(self.cross_layers) for part in ("key", "value"))


def decoder_spec(manifest: Manifest) -> DecoderSpec | None:
    """Return the decoder's record, or None for a single-pass model.

    Raises:
        SessionError: if the manifest's record and its graphs do not go together.
    """
    if "decoder" not in manifest.graphs:
        return None
    if manifest.generation is None:
        raise SessionError(
            f"bundle {manifest.name!r} has a decoder graph but no generation record in manifest.json",
            hint="export the bundle again",
        )
    known = {item.name for item in fields(DecoderSpec)}
    record = {name: value for name, value in manifest.generation.items() if name in known}
    return from_mapping(DecoderSpec, record, "manifest.json: generation", SessionError)
