"""What virtual tokens leave in the base's key-value cache, read off peft and the base, and proven to be all of it."""

from __future__ import annotations

from typing import Any

import torch

from edgeadapt.adapters.adapter import Adapter, Array
from edgeadapt.errors import AdapterError, MergeError
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.quiet import quiet
from edgeadapt.merging.reference import adapted_module
from edgeadapt.merging.virtual_tokens import CACHES

TOLERANCE = 1e-4
_PROBE_TOKENS = 6
Layers = list[tuple[torch.Tensor, torch.Tensor]]


def past_of(base: BaseModel, adapter: Adapter) -> tuple[tuple[Array, Array], ...]:
    """Return the key and value of an adapter's virtual tokens in each layer's cache, float32[heads, tokens, dim].

    Raises:
        AdapterError: if the base is no decoder-only language model, or the adapter is for one of another shape.
        MergeError: if peft cannot load it, or the base with these keys and values is not what peft computes.
    """
    if base.task != "text-generation" or getattr(base.config, "is_encoder_decoder", False):
        raise AdapterError(
            f"virtual tokens are held in the key-value cache of a decoder-only language model, and {base.name} for "
            f"{base.task} has none",
            hint="train LoRA for this model",
        )
    tokens = int(adapter.config["num_virtual_tokens"])
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is not None and tokens + _PROBE_TOKENS > limit:
        raise AdapterError(
            f"it begins every text with {tokens} virtual tokens, and {base.name} has {limit} positions",
            hint="give the base that the adapter was trained on",
        )
    probe = torch.arange(_PROBE_TOKENS)[None] % int(base.config.vocab_size)
    with quiet(), torch.no_grad():
        wanted = _shape(_layers(base.module(input_ids=probe[:, :1], use_cache=True).past_key_values))
        _check_config(adapter, base, wanted)
        model: Any = adapted_module(base, adapter)
        layers = _run(base, model, adapter)
        expected = model(input_ids=probe, use_cache=False).logits
        mask = torch.ones((1, tokens + _PROBE_TOKENS), dtype=torch.int64)
        found = base.module(input_ids=probe, attention_mask=mask, past_key_values=cache_of(layers)).logits
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise MergeError(
            f"adapter {adapter.name!r} does more than its keys and values: peft's own logits differ from the base's "
            f"with them by {error:.2g} of the largest",
            hint="please report the model's class and the adapter's configuration",
        )
    return tuple((key[0].numpy().copy(), value[0].numpy().copy()) for key, value in layers)


def _check_config(adapter: Adapter, base: BaseModel, wanted: tuple[int, int, int]) -> None:
    """Refuse an adapter for other layers, heads or sizes before peft fails with them, or does not."""
    config = adapter.config
    if config["peft_type"] in CACHES:
        heads = config["num_attention_heads"]
        found = (config["num_layers"], heads, config["token_dim"] // heads)
        what = "{0} layers of {1} key-value heads of {2}"
        if found != wanted:
            raise AdapterError(
                f"it was trained for {what.format(*found)}, {base.name} has {what.format(*wanted)}",
                hint="give the base that the adapter was trained on",
            )
        return
    width = adapter.tensors["prompt_embeddings"].shape[1]
    own = base.module.get_input_embeddings().embedding_dim  # type: ignore[operator]
    if width != own:
        raise AdapterError(
            f"it was trained for embeddings of {width} numbers, {base.name} has {own}",
            hint="give the base that the adapter was trained on",
        )


def _run(base: BaseModel, model: Any, adapter: Adapter) -> Layers:
    tokens = int(adapter.config["num_virtual_tokens"])
    task = None if adapter.task_id is None else torch.tensor([adapter.task_id])
    prompt = model.get_prompt(1, task_ids=task, max_cache_len=tokens + _PROBE_TOKENS)
    if adapter.config["peft_type"] in CACHES:
        return [(_whole(key, tokens), _whole(value, tokens)) for key, value in _layers(prompt)]
    return _layers(base.module(inputs_embeds=prompt, past_key_values=cache_of([]), use_cache=True).past_key_values)


def _whole(values: torch.Tensor, tokens: int) -> torch.Tensor:
    """Fill up what a layer with a sliding window has forgotten, and nobody can see, with zeros."""
    return torch.nn.functional.pad(values, (0, 0, tokens - values.shape[2], 0))


def cache_of(layers: Layers) -> Any:
    """Return a cache of transformers that begins with the given keys and values."""
    from transformers import DynamicCache

    cache = DynamicCache()  # without the config: layers with a sliding window keep all their tokens, masks do the rest
    for index, (key, value) in enumerate(layers):
        cache.update(key, value, index)
    return cache


def _layers(cache: Any) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _shape(layers: Layers) -> tuple[int, int, int]:
    return len(layers), int(layers[0][0].shape[1]), int(layers[0][0].shape[3])
