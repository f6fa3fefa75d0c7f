"""A base as ONNX models whose adapter sites are still markers.

A marker is a node of domain `edgeadapt` that passes a tensor through and remembers where it comes from:

- `AdapterSite(x, y) -> y`, attribute `site` (module path): a module with input x and output y;
- `ParameterSite(p) -> p`, attribute `parameter` (parameter name): a parameter that an adapter replaces whole.

Markers survive fusion and quantization; `quantize.pack` lowers them last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

MARKER_DOMAIN = "edgeadapt"
ADAPTER_SITE = "AdapterSite"
PARAMETER_SITE = "ParameterSite"


@dataclass(frozen=True)
class Generation:
    """What a loop over a decoder needs to know.

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


@dataclass(frozen=True)
class Graph:
    """ONNX models by role with markers in place.

    models: "model" for a single pass, "decoder" for a decoder, "encoder" and "decoder" for a sequence-to-sequence model
    seconds: time per stage of the export, for the user's eyes (not part of the bundle)
    """

    models: Mapping[str, ir.Model]
    task: str
    generation: Generation | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
