"""Key-value caches: what a decoder has already read, one row per sequence.

`SharedCache` is for decoders with GroupQueryAttention: one buffer per layer and part, [batch, heads, max_length, dim]
of float32 or int8 codes, that is past and present at once and is updated in place. `GrowingCache` is for decoders that
concatenate (sequence-to-sequence models): the present of a step becomes the past of the next.

A row begins with its adapter's prefix, if that has one: virtual tokens that are held before those of the user.

A cache belongs to the adapter that filled it. Keys and values of one adapter mean nothing to another, so a step with
another adapter is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgeadapt.adapters.adapter import Prefix
from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import SessionError
from edgeadapt.runtime.ort import Rows, Tensor

Array = NDArray[Any]
_MASK_COLUMNS = 128
"""Columns by which a mask grows: it is bound anew once in so many tokens."""
AdapterKey = tuple[tuple[str, float], ...]
"""Which adapter is active, in a form that can be compared: () for none, else names with weights, sorted."""


class Cache:
    """The state of `batch_size` sequences.

    max_length: the longest sequence that fits, in tokens of the user
    lengths: int64[batch], how many tokens of the user each row holds; read-only
    held: int64[batch], the same with the prefix before them; read-only
    adapter: which adapter filled it, None as long as it is empty
    """

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.max_length = max_length
        self.adapter: AdapterKey | None = None
        self._held = np.zeros(batch_size, np.int64)
        self._starts = np.zeros(batch_size, np.int64)

    @property
    def batch_size(self) -> int:
        """How many rows there are."""
        return len(self._held)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of the user that each row holds, int64[batch], a copy."""
        return self._held - self._starts

    @property
    def held(self) -> NDArray[np.int64]:
        """Positions that each row holds: its prefix and the user's tokens, int64[batch], a copy."""
        return self._held.copy()

    @property
    def capacity(self) -> int:
        """How many positions a row has room for."""
        return self.max_length

    def advance(self, counts: Array) -> None:
        """Count `counts` int64[batch] more tokens."""
        self._held += counts  # in place: parts of a cache look at the same numbers

    def check_room(self, counts: Array) -> None:
        """Refuse tokens that do not fit.

        Raises:
            SessionError: naming the first row that would be too long.
        """
        room = np.minimum(self.max_length, self.capacity - self._starts)
        for row in np.flatnonzero(self.lengths + counts > room):
            what = f"max_length {self.max_length}"
            if room[row] < self.max_length:
                what = f"{room[row]}, which are left beside {self._starts[row]} virtual tokens of its adapter"
            raise SessionError(
                f"row {row} of the cache holds {self.lengths[row]} tokens and {counts[row]} more do not fit into "
                f"{what}",
                hint="make a larger one with session.new_cache(batch_size, max_length), or shorten the input",
            )

    def shorten(self, row: int, length: int) -> None:
        """Forget what a row holds from the user's token `length` on."""
        self._held[row] = min(int(self._held[row]), int(self._starts[row]) + length)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but `rows`, in that order."""
        self._held, self._starts = self._held[list(rows)], self._starts[list(rows)]


class OneToken:
    """What steps of one token in one row are fed from and write to, in place.

    ids: int64[1, 1]; logits: float32[1, 1, vocab]
    """

    def __init__(self, vocab_size: int, max_length: int) -> None:
        self.ids = Tensor(np.zeros((1, 1), np.int64))
        self.logits = Tensor(np.zeros((1, 1, vocab_size), np.float32))
        self._max_length = max_length
        self._mask: Tensor | None = None
        self._total = 0

    def mask(self, total: int) -> Tensor:
        """Return int64[1, columns] that begins with `total` ones; the same tensor as long as they fit.

        What follows are zeros: the graphs count ones, as they must for rows of different lengths.
        """
        if self._mask is not None and total == self._total + 1 and total <= self._mask.shape[1]:
            self._mask.numpy()[0, total - 1] = 1
        else:
            columns = min(_MASK_COLUMNS * (total // _MASK_COLUMNS + 1), self._max_length)
            values = np.zeros((1, columns), np.int64)
            values[0, :total] = 1
            self._mask = Tensor(values)
        self._total = total
        return self._mask


class SharedCache(Cache):
    """Buffers [batch, heads, capacity, dim] by name ("0.key"), float32 or int8 codes, updated in place.

    Codes are numbers as good as any here: rows are copied, kept and dropped as they are.

    prefix_room: the longest prefix that an adapter of its rows may have. Together with the user's tokens it has no
        more room than the model has positions.
    """

    def __init__(
        self, spec: DecoderSpec, batch_size: int, max_length: int, device: str, *, prefix_room: int = 0
    ) -> None:
        super().__init__(batch_size, max_length)
        self.vocab_size = spec.vocab_size
        self._capacity = min(max_length + prefix_room, spec.max_length)
        shape = (batch_size, spec.cache_heads, self._capacity, spec.cache_head_dim)
        self._device = device
        self.buffers: Mapping[str, Tensor | Rows] = {
            name: Tensor(np.zeros(shape, spec.cache_dtype), device) for name in spec.cache_names
        }
        self._parts: dict[tuple[int, int], Self] = {}
        self._one_token: OneToken | None = None

    @property
    def capacity(self) -> int:
        """How many positions a row has room for."""
        return self._capacity

    @property
    def position(self) -> int:
        """Where the first row's next token goes."""
        return int(self._held[0])

    @position.setter
    def position(self, value: int) -> None:
        self._held[0] = value

    @property
    def end(self) -> int:
        """The position at which the first row is full."""
        return min(int(self._starts[0]) + self.max_length, self._capacity)

    def begin(self, row: int, prefix: Prefix | None) -> None:
        """Make a row hold an adapter's prefix, or nothing, and no token.

        Raises:
            SessionError: if the cache was made before there was an adapter with so long a prefix.
        """
        tokens = 0 if prefix is None else prefix.tokens
        if tokens >= self._capacity:
            raise SessionError(
                f"the adapter begins with {tokens} virtual tokens, and the cache has room for {self._capacity}",
                hint="make the cache after the adapter is known to the session, and a larger one",
            )
        for part, values in (("key", prefix.keys), ("value", prefix.values)) if prefix is not None else ():
            for layer, value in enumerate(values):
                self.buffers[f"{layer}.{part}"].write(row, value)
        self._held[row] = self._starts[row] = tokens

    @property
    def one_token(self) -> OneToken | None:
        """Tensors for steps of one token; None where there are several rows, or on another device than the CPU."""
        if self._one_token is None and len(self._held) == 1 and self._device == "cpu":
            self._one_token = OneToken(self.vocab_size, self._capacity)
        return self._one_token

    @property
    def bytes_per_token(self) -> int:
        """How much memory one token of one row takes."""
        return sum(x.dtype.itemsize * x.shape[1] * x.shape[3] for x in self.buffers.values())

    def row(self, index: int) -> Mapping[str, Tensor | Rows]:
        """Return views of one row's buffers, [1, heads, max_length, dim], the same objects at each call."""
        return self.part(index, 1).buffers

    def part(self, first: int, count: int) -> Self:
        """Return rows `first` to `first + count - 1` as a cache that shares their memory, the same one at each call."""
        if (first, count) not in self._parts:
            part = copy.copy(self)
            vars(part).update(
                _held=self._held[first : first + count],
                _starts=self._starts[first : first + count],
                buffers={name: buffer.rows(first, count) for name, buffer in self.buffers.items()},
                _parts={},
                _one_token=None,
            )
            self._parts[first, count] = part
        return self._parts[first, count]

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` what row `source` is."""
        self.take_row(target, self, source)

    def take_row(self, row: int, other: SharedCache, source: int) -> None:
        """Make row `row` what row `source` of another cache is, prefix and tokens."""
        held = int(other._held[source])
        for name, buffer in self.buffers.items():
            buffer.write(row, other.buffers[name].numpy()[source, :, :held])
        self._held[row], self._starts[row] = held, other._starts[source]

    def read_row(self, row: int, length: int) -> dict[str, Array]:
        """Return copies of the user's first `length` tokens in a row, [heads, length, dim] by name."""
        start = int(self._starts[row])
        return {name: np.array(x.numpy()[row, :, start : start + length]) for name, x in self.buffers.items()}

    def write_row(self, row: int, content: Mapping[str, Array], length: int) -> None:
        """Make a row hold, after its prefix, the first `length` tokens of what `read_row` returned, and no other."""
        start = int(self._starts[row])
        for name, buffer in self.buffers.items():
            buffer.write(row, content[name][:, :length], start)
        self._held[row] = start + length

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but `rows`, in that order (copies the buffers)."""
        super().keep(rows)
        chosen = list(rows)
        self.buffers = {name: Tensor(x.numpy()[chosen], self._device) for name, x in self.buffers.items()}
        self._parts = {}
        self._one_token = None


class GrowingCache(Cache):
    """Tensors float32[batch, heads, length, dim] by name, replaced at each step; and what came from an encoder.

    cross: by name ("cross.0.key"), float32[batch, heads, encoder_seq, dim]
    encoder_mask: int64[batch, encoder_seq], or None where the decoder takes none
    """

    def __init__(
        self,
        spec: DecoderSpec,
        batch_size: int,
        max_length: int,
        *,
        cross: Mapping[str, Tensor] | None = None,
        encoder_mask: Tensor | None = None,
    ) -> None:
        super().__init__(batch_size, max_length)
        empty = np.zeros((batch_size, spec.cache_heads, 0, spec.cache_head_dim), np.float32)
        self.past = {name: Tensor(empty) for name in spec.cache_names}
        self.cross = dict(cross or {})
        self.encoder_mask = encoder_mask

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but `rows`, in that order."""
        super().keep(rows)
        chosen = list(rows)
        self.past = {name: Tensor(x.numpy()[chosen]) for name, x in self.past.items()}
        self.cross = {name: Tensor(x.numpy()[chosen]) for name, x in self.cross.items()}
        if self.encoder_mask is not None:
            self.encoder_mask = Tensor(self.encoder_mask.numpy()[chosen])
