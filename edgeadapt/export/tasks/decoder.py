"""Decoder-only language models: GroupQueryAttention with an in-place cache, rotary inside where that is provably equal.

transformers' own attention is replaced, for the time of the trace, by one symbolic com.microsoft::GroupQueryAttention
per layer (its `AttentionInterface`), and the rotary embedding by the same operator's `do_rotary` where the model's
rotary is the half-split kind of fixed frequencies. Everything else is the model's own code.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import ExportError
from edgeadapt.export.trace import Trace
from edgeadapt.merging.base_model import BaseModel

ORDER = 2
ATTENTION = "edgeadapt_gqa"
DEFAULT_MAX_LENGTH = 8192


def claims(base: BaseModel) -> bool:
    """Return whether `base` generates text without an encoder."""
    return base.task == "text-generation" and not getattr(base.config, "is_encoder_decoder", False)


def generation(base: BaseModel) -> DecoderSpec:
    """Return the cache's shape and the tokens that end a text."""
    config = base.config
    heads = config.num_attention_heads
    eos = getattr(base.module.generation_config, "eos_token_id", None)
    eos = config.eos_token_id if eos is None else eos
    return DecoderSpec(
        cache_layers=config.num_hidden_layers,
        cache_heads=getattr(config, "num_key_value_heads", None) or heads,
        cache_head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        cross_layers=0,
        max_length=_max_length(base),
        vocab_size=config.vocab_size,
        shared_cache=True,
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        pad_token_id=config.pad_token_id,
    )


def _max_length(base: BaseModel) -> int:
    config = base.config
    limit = int(getattr(config, "max_position_embeddings", DEFAULT_MAX_LENGTH))
    scaling = getattr(config, "rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type")) in ("longrope", "dynamic"):
        # Beyond this length these kinds change their frequencies, which a fixed table cannot follow.
        limit = int(getattr(config, "original_max_position_embeddings", limit))
    if base.max_length is not None and base.max_length > limit:
        raise ExportError(
            f"max_length {base.max_length} is more than the {limit} tokens that {base.name} can place",
            hint=f"give at most {limit}",
        )
    return base.max_length or min(limit, DEFAULT_MAX_LENGTH)


class _PassThroughCache(Cache):
    """Hands new keys and values straight to the attention, which owns the real cache."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> Any:
        return key_states, value_states

    def get_seq_length(self, *_args: Any, **_kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, cache_position: torch.Tensor, _layer_idx: int) -> tuple[int, int]:
        return cache_position.shape[0], 0


class _Step:
    """What the attention of every layer needs during one trace."""

    def __init__(self) -> None:
        self.past: list[torch.Tensor] = []
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.seqlens: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self.total_dim: Any = 0
        self.rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self.tables: tuple[torch.Tensor, torch.Tensor] | None = None


_STEP = _Step()


def _attention(  # noqa: PLR0917 - transformers calls it so
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Emit GroupQueryAttention for query float32[batch, heads, seq, dim], key and value with kv_heads."""
    _refuse_unknown(kwargs)
    batch, heads, seq, dim = query.shape
    kv_heads = key.shape[1]
    if scaling is None:
        scaling = dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
        if getattr(module, "scale_attn_by_inverse_layer_idx", False):
            scaling /= module.layer_idx + 1
    step, layer = _STEP, module.layer_idx
    flat = [x.transpose(1, 2).reshape(batch, seq, -1) for x in (query, key, value)]
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": float(scaling)}
    if sliding_window is not None:
        attributes["local_window_size"] = int(sliding_window)
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    inputs = [*flat, step.past[2 * layer], step.past[2 * layer + 1], step.seqlens, step.total]
    if step.rotary is not None:
        attributes["do_rotary"] = 1
        inputs += step.rotary
    cache = (batch, kv_heads, step.total_dim, dim)
    output, new_key, new_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attributes,
        dtypes=(query.dtype,) * 3,
        shapes=[(batch, seq, heads * dim), cache, cache],
        version=1,
    )
    step.present[layer] = (new_key, new_value)
    return output.reshape(batch, seq, heads, dim), None


_HARMLESS = {
    "dropout",
    "is_causal",
    "output_attentions",
    "position_ids",
    "cache_position",
    "use_cache",
    "logits_to_keep",
}


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    unknown = [name for name, value in kwargs.items() if name not in _HARMLESS and value is not None]
    if unknown:
        raise ExportError(
            f"the model's attention uses {', '.join(sorted(unknown))}, which the exported attention does not have",
            hint="this decoder needs support in edgeadapt/export/tasks/decoder.py",
        )


class _Decoder(torch.nn.Module):
    """input_ids, attention_mask, logits_from, past... -> logits, present..."""

    def __init__(self, base: BaseModel, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        super().__init__()
        self.module = base.module
        self.rotary = rotary is not None
        if rotary is not None:
            self.cos_cache: torch.Tensor
            self.sin_cache: torch.Tensor
            self.register_buffer("cos_cache", rotary[0], persistent=False)
            self.register_buffer("sin_cache", rotary[1], persistent=False)

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        input_ids, attention_mask, logits_from, *past = args
        seq = input_ids.shape[1]
        step = _STEP
        step.past, step.present = list(past), {}
        seen = attention_mask.sum(1)
        step.seqlens = (seen - 1).to(torch.int32)
        step.total = torch.onnx.ops.symbolic(
            "edgeadapt::TotalLength", (attention_mask,), {}, dtype=torch.int32, shape=()
        )
        step.total_dim = attention_mask.shape[1]
        step.rotary = (self.cos_cache, self.sin_cache) if self.rotary else None
        positions = torch.arange(seq)
        kept = torch.onnx.ops.symbolic(
            "edgeadapt::PositionsFrom", (logits_from, input_ids), {}, dtype=torch.int64, shape=(seq,)
        )
        result = self.module(
            input_ids=input_ids,
            attention_mask=None,
            position_ids=torch.clamp(seen - seq, min=0)[:, None] + positions[None],
            past_key_values=_PassThroughCache(),
            use_cache=True,
            cache_position=positions,
            logits_to_keep=kept,
        )
        present = [tensor for layer in sorted(step.present) for tensor in step.present[layer]]
        return (result.logits, *present)


def traces(base: BaseModel) -> dict[str, Trace]:
    """Return the trace of role "decoder".

    Raises:
        ExportError: if the model's code does not go through transformers' attention interface.
    """
    if "logits_to_keep" not in inspect.signature(base.module.forward).parameters:
        raise ExportError(
            f"{type(base.module).__name__} has no logits_to_keep, which the export needs",
            hint="use a decoder that follows transformers' current conventions (Llama, Qwen, GPT-2, Mistral, Phi)",
        )
    shape = generation(base)
    batch, seq, past = 2, 3, 5
    inputs: dict[str, torch.Tensor] = {
        "input_ids": torch.zeros((batch, seq), dtype=torch.int64),
        "attention_mask": torch.ones((batch, past + seq), dtype=torch.int64),
        "logits_from": torch.zeros(1, dtype=torch.int64),
    }
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total_sequence"},
    }
    outputs = ["logits"]
    output_axes: dict[str, dict[int, str]] = {"logits": {0: "batch", 1: "kept"}}
    for layer in range(shape.cache_layers):
        for part in ("key", "value"):
            name = f"past_key_values.{layer}.{part}"
            inputs[name] = torch.zeros(batch, shape.cache_heads, past, shape.cache_head_dim)
            axes[name] = {0: "batch", 2: "past_sequence"}
            outputs.append(f"present.{layer}.{part}")
            output_axes[outputs[-1]] = {0: "batch", 2: "cache_sequence"}
    wrapper = _Decoder(base, _STEP.tables)
    return {"decoder": Trace(wrapper, inputs, axes, tuple(outputs), output_axes)}


@contextlib.contextmanager
def tracing(base: BaseModel) -> Iterator[None]:
    """Route the model's attention, and its rotary embedding where equal, through GroupQueryAttention."""
    AttentionInterface.register(ATTENTION, _attention)
    modeling = sys.modules[type(base.module).__module__]
    original = getattr(modeling, "apply_rotary_pos_emb", None)
    # transformers' own switch refuses names that it did not load with.
    before = base.config._attn_implementation  # noqa: SLF001
    base.config._attn_implementation = ATTENTION  # noqa: SLF001
    # Looked at before the patch below: afterwards the model's rotary does nothing.
    _STEP.tables = rotary_cache(base, _max_length(base))
    inside = _STEP.tables is not None
    try:
        if inside:
            modeling.apply_rotary_pos_emb = lambda q, k, *_args, **_kwargs: (q, k)  # type: ignore[attr-defined]
        yield
    finally:
        if inside:
            modeling.apply_rotary_pos_emb = original  # type: ignore[attr-defined]
        base.config._attn_implementation = before  # noqa: SLF001


def rotary_cache(base: BaseModel, length: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return cos and sin tables float32[length, rotary_dim / 2] if the model's rotary equals the operator's, else None.

    None means that the model's own rotary code is exported: always right, some operators more.
    """
    modeling = sys.modules[type(base.module).__module__]
    apply = getattr(modeling, "apply_rotary_pos_emb", None)
    found = [module for name, module in base.module.named_modules() if "rotary_emb" in name.rsplit(".", 1)[-1]]
    if apply is None or len(found) != 1:
        return None
    with torch.no_grad():
        cos, sin = found[0](torch.zeros(1, 1), torch.arange(length)[None])
        half = cos.shape[-1] // 2
        same_halves = torch.equal(cos[..., :half], cos[..., half:]) and torch.equal(sin[..., :half], sin[..., half:])
        if not same_halves or cos.shape[-1] % 2:
            return None
        probe = torch.linspace(-1, 1, length * half * 2).reshape(1, 1, length, half * 2)
        rotated, _ = apply(probe, probe, cos, sin)
        first, second = probe[..., :half], probe[..., half:]
        c, s = cos[:, None, :, :half], sin[:, None, :, :half]
        expected = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    if not torch.allclose(rotated, expected, atol=1e-6):
        return None
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
