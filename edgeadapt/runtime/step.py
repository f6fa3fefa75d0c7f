"""One step of a decoder: some tokens for each row in, logits out, the cache advanced.

GroupQueryAttention sets the rules (checked on ONNX Runtime 1.32, CPU):

- it takes a row's past length from the row's count of ones in the attention mask minus the step's width, so a row
  always gets `past + width` ones and its pad tokens count as tokens at the end; they are causally after every valid
  token, their logits are dropped, and the next step overwrites what they left in the cache;
- several tokens at once on top of a past work for a batch of one only ("batch_size must be 1 when sequence_length > 1
  and past context is given"), so then the rows run one after the other, each on its own slice of the cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import SessionError
from edgeadapt.runtime.cache import Cache, GrowingCache, SharedCache
from edgeadapt.runtime.ort import Binding, Tensor

Array = NDArray[Any]
Wanted = Literal["all", "last", "none"]


def run_step(
    binding: Binding, spec: DecoderSpec, input_ids: Any, cache: Cache, *, lengths: Any = None, logits: Wanted = "all"
) -> Array:
    """Run one step; see `Session.step`, which adds the check that the cache belongs to the active adapter."""
    if lengths is None and isinstance(cache, SharedCache):
        found = _step_one_token(binding, spec, input_ids, cache, logits)
        if found is not None:
            return found
    ids = checked_ids(input_ids, spec, "input_ids")
    counts = _checked_lengths(lengths, ids, cache, logits)
    cache.check_room(counts)
    if isinstance(cache, SharedCache):
        return _step_shared(binding, ids, cache, counts, logits)
    assert isinstance(cache, GrowingCache)
    return _step_growing(binding, ids, cache, counts, logits)


def checked_ids(value: Any, spec: DecoderSpec, name: str) -> NDArray[np.int64]:
    """Return token ids as int64[batch, seq].

    Raises:
        SessionError: if they are not whole numbers in two axes, or are outside of the vocabulary.
    """
    ids = np.asarray(value)
    if ids.dtype.kind not in "iu" or ids.ndim != 2 or ids.size == 0:
        raise SessionError(
            f"{name} is {ids.dtype.name}{list(ids.shape)}, expected int64[batch, seq] with at least one token",
            hint="give token ids as a two-dimensional array of whole numbers, one row per sequence",
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= spec.vocab_size:
        raise SessionError(
            f"{name} holds the token id {low if low < 0 else high}; the vocabulary has {spec.vocab_size} tokens",
            hint="encode the text with the bundle's own tokenizer",
        )
    return np.ascontiguousarray(ids, np.int64)


def _checked_lengths(lengths: Any, ids: Array, cache: Cache, logits: str) -> NDArray[np.int64]:
    if logits not in ("all", "last", "none"):
        raise SessionError(f"logits is {logits!r}", hint='give "all", "last" or "none"')
    if ids.shape[0] != cache.batch_size:
        raise SessionError(
            f"input_ids has {ids.shape[0]} rows, the cache has {cache.batch_size}",
            hint="make a cache for this batch with session.new_cache(batch_size, max_length)",
        )
    if lengths is None:
        return np.full(ids.shape[0], ids.shape[1], np.int64)
    counts = np.asarray(lengths)
    low = 1 if logits == "last" else 0
    valid = counts.shape == (ids.shape[0],) and counts.dtype.kind in "iu"
    if not valid or counts.min() < low or counts.max() > ids.shape[1]:
        raise SessionError(
            f"lengths is {counts.tolist()}, expected one whole number from {low} to {ids.shape[1]} for each of "
            f"{ids.shape[0]} rows",
            hint="lengths says how many tokens of each right-padded row are real",
        )
    return counts.astype(np.int64)


def _step_one_token(
    binding: Binding, spec: DecoderSpec, input_ids: Any, cache: SharedCache, logits: Wanted
) -> Array | None:
    """Run the step that writing consists of: one token of one row; None for any other one, and for wrong arguments.

    While a step runs, the weights go through the caches, and all of Python's code is read from memory again after it:
    so little happens here: 0.09 ms of 6.5 instead of 0.29 (SmolLM2, int8, 2 threads).
    """
    ids = np.asarray(input_ids)
    one = cache.one_token
    if ids.shape != (1, 1) or one is None or ids.dtype.kind not in "iu" or logits not in ("last", "all"):
        return None
    token, total = int(ids[0, 0]), cache.position + 1
    if not 0 <= token < spec.vocab_size or total > cache.end:
        return None
    one.ids.numpy()[0, 0] = token
    binding.set_input("input_ids", one.ids)
    binding.set_input("attention_mask", one.mask(total))
    _keep_from(binding, 0)
    binding.share(cache.buffers, "past_key_values.", "present.")
    binding.set_output("logits", one.logits)
    binding.run()
    cache.position = total
    return one.logits.numpy().copy()


def _step_shared(binding: Binding, ids: Array, cache: SharedCache, counts: Array, logits: Wanted) -> Array:
    width = int(counts.max())
    if width == 0:
        return np.zeros((len(ids), 0, cache.vocab_size), np.float32)
    past = cache.held
    fits = int(past.max()) + width <= cache.capacity
    if len(ids) > 1 and not (fits and (width == 1 or not past.any())):
        return _row_by_row(binding, ids, cache, counts, logits)
    ragged = bool((counts != width).any())
    if logits == "last" and ragged:
        # The rows' last tokens lie at different positions: read all but those, then those in one step of width 1.
        _step_shared(binding, ids, cache, counts - 1, "none")
        last = np.take_along_axis(ids, counts[:, None] - 1, axis=1)
        return _step_shared(binding, last, cache, np.ones_like(counts), "last")
    first_kept = {"all": 0, "last": width - 1, "none": width - 1}[logits]
    found = _run_shared(binding, cache.buffers, ids[:, :width], past, first_kept)
    cache.advance(counts)
    if logits == "none":
        return found[:, :0]
    if logits == "last" or (not ragged and width == ids.shape[1]):
        return found
    result = np.zeros((len(ids), ids.shape[1], found.shape[2]), np.float32)
    for row, count in enumerate(counts):
        result[row, :count] = found[row, :count]
    return result


def _row_by_row(binding: Binding, ids: Array, cache: SharedCache, counts: Array, logits: Wanted) -> Array:
    kept = {"all": ids.shape[1], "last": 1, "none": 0}[logits]
    result = np.zeros((len(ids), kept, cache.vocab_size), np.float32)
    past = cache.held
    for row in np.flatnonzero(counts):
        count = int(counts[row])
        first_kept = 0 if logits == "all" else count - 1
        found = _run_shared(binding, cache.row(int(row)), ids[row : row + 1, :count], past[row : row + 1], first_kept)
        if logits != "none":
            result[row, : found.shape[1]] = found[0]
    cache.advance(counts)
    return result


def _run_shared(binding: Binding, buffers: Any, ids: Array, past: Array, first_kept: int) -> Array:
    """Run rows that fit one call: ids int64[batch, width], past int64[batch] -> float32[batch, kept, vocab]."""
    width = ids.shape[1]
    total = int(past.max()) + width
    mask = (np.arange(total) < (past + width)[:, None]).astype(np.int64)
    binding.set_input("input_ids", Tensor(ids))
    binding.set_input("attention_mask", Tensor(mask))
    trimmed = _keep_from(binding, first_kept)
    binding.share(buffers, "past_key_values.", "present.")
    binding.allocate_output("logits")
    found = binding.run()["logits"]
    return found if trimmed else found[:, first_kept:]


def _keep_from(binding: Binding, first_kept: int) -> bool:
    """Have the graph compute logits from position `first_kept` on only; return whether it can."""
    if "logits_from" not in binding.graph.optional and "logits_from" not in binding.graph.inputs:
        return False
    binding.set_input("logits_from", _position(first_kept))
    return True


@lru_cache(maxsize=256)
def _position(value: int) -> Tensor:
    return Tensor(np.asarray([value], np.int64))


def _step_growing(binding: Binding, ids: Array, cache: GrowingCache, counts: Array, logits: Wanted) -> Array:
    if (counts != ids.shape[1]).any():
        raise SessionError(
            f"this decoder's cache grows by whole columns, so rows of lengths {counts.tolist()} cannot share a step",
            hint="give every row the same number of tokens in a step, or run the rows one by one",
        )
    first_kept = 0 if logits == "all" else ids.shape[1] - 1
    inputs = binding.graph.inputs
    binding.set_input("decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids", Tensor(ids))
    if "attention_mask" in inputs:
        total = int(cache.lengths.max()) + ids.shape[1]
        binding.set_input("attention_mask", Tensor(np.ones((len(ids), total), np.int64)))
    if cache.encoder_mask is not None:
        binding.set_input("encoder_attention_mask", cache.encoder_mask)
    for name, tensor in cache.cross.items():
        binding.set_input(name, tensor)
    for name, tensor in cache.past.items():
        binding.set_input(f"past_key_values.{name}", tensor)
        binding.allocate_output(f"present.{name}")
    trimmed = _keep_from(binding, first_kept)
    binding.allocate_output("logits")
    found = binding.run()
    cache.past = {name: Tensor(found[f"present.{name}"]) for name in cache.past}
    cache.advance(counts)
    kept = found["logits"] if trimmed else found["logits"][:, first_kept:]
    return kept[:, :0] if logits == "none" else kept
