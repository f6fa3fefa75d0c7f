"""Whole sequences through a decoder, with padding on either side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import SessionError
from edgeadapt.runtime.cache import SharedCache
from edgeadapt.runtime.checks import is_whole
from edgeadapt.runtime.step import checked_ids

if TYPE_CHECKING:
    from edgeadapt.runtime.session import Session

Array = NDArray[Any]


def filled_cache(session: Session, inputs: Mapping[str, Any]) -> SharedCache:
    """Return a cache that has read whole sequences with the active adapter; inputs as for `run_decoder`.

    Raises:
        SessionError: as `run_decoder` does.
    """
    _, lengths, shifted = _on_the_left(session, session.require_decoder(), inputs)
    cache = session.new_cache(len(shifted), shifted.shape[1])
    assert isinstance(cache, SharedCache)
    session.step(shifted, cache, lengths=lengths, logits="none")
    return cache


def run_decoder(
    session: Session, spec: DecoderSpec, inputs: Mapping[str, Any], chunk_size: int | None
) -> dict[str, Array]:
    """Return {"logits": float32[batch, seq, vocab]} for `input_ids` and an optional `attention_mask`.

    Rows are moved to the left edge first, where their positions start at 0, and back afterwards.

    Raises:
        SessionError: for unknown inputs, a mask with holes, an empty row, or too long a sequence.
    """
    starts, lengths, shifted = _on_the_left(session, spec, inputs)
    width = shifted.shape[1]
    if chunk_size is not None and not is_whole(chunk_size, 1):
        raise SessionError(f"chunk_size is {chunk_size!r}", hint="give a whole number of 1 or more, or leave it out")
    cache = session.new_cache(len(shifted), width)
    logits = np.zeros((*np.shape(inputs["input_ids"]), spec.vocab_size), np.float32)
    for first in range(0, width, chunk_size or width):
        chunk = shifted[:, first : first + (chunk_size or width)]
        counts = np.clip(lengths - first, 0, chunk.shape[1])
        found = session.step(chunk, cache, lengths=counts)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            logits[row, start + first : start + first + count] = found[row, :count]
    return {"logits": logits}


def _on_the_left(session: Session, spec: DecoderSpec, inputs: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """Return where each row begins and how long it is, int64[batch] each, and the rows moved to the left edge."""
    unknown = [name for name in inputs if name not in ("input_ids", "attention_mask")]
    if unknown or "input_ids" not in inputs:
        raise SessionError(
            f"unknown input {unknown[0]!r}" if unknown else "input 'input_ids' is missing",
            hint="a decoder takes input_ids int64[batch, seq] and optionally attention_mask int64[batch, seq]",
        )
    ids = checked_ids(inputs["input_ids"], spec, "input_ids")
    starts, lengths = _spans(inputs.get("attention_mask"), ids)
    width = int(lengths.max())
    if width > (room := session.room_beside(session.active.key)):
        beside = "" if room == spec.max_length else " beside its adapter's virtual tokens"
        raise SessionError(
            f"input_ids has a row of {width} tokens; this model takes at most {room}{beside}",
            hint="shorten the input",
        )
    shifted = np.zeros((len(ids), width), np.int64)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        shifted[row, :length] = ids[row, start : start + length]
    return starts, lengths, shifted


def _spans(mask: Any, ids: Array) -> tuple[Array, Array]:
    """Return the first valid position and the number of valid positions of each row, int64[batch] each."""
    if mask is None:
        return np.zeros(len(ids), np.int64), np.full(len(ids), ids.shape[1], np.int64)
    values = np.asarray(mask)
    hint = "attention_mask holds 1 for tokens and 0 for padding, which is left or right of a row's tokens"
    if values.shape != ids.shape or values.dtype.kind not in "iub" or not np.isin(values, (0, 1)).all():
        raise SessionError(
            f"attention_mask is {values.dtype.name}{list(values.shape)}, expected zeros and ones of shape "
            f"{list(ids.shape)} like input_ids",
            hint=hint,
        )
    values = values.astype(np.int64)
    lengths = values.sum(axis=1)
    starts = values.argmax(axis=1)
    position = np.arange(ids.shape[1])
    expected = (position >= starts[:, None]) & (position < (starts + lengths)[:, None])
    for row in np.flatnonzero((expected != values).any(axis=1) | (lengths == 0)):
        raise SessionError(f"attention_mask row {row} is {values[row].tolist()}", hint=hint)
    return starts, lengths
