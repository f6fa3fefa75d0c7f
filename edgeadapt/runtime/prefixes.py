"""Keys and values of texts that were read before, so that a prompt that begins like one of them is not read again.

An entry belongs to the content of the adapter that filled it, not to its name: keys of one adapter mean nothing to
another, and a name may come to stand for other tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import SessionError
from edgeadapt.runtime.cache import SharedCache
from edgeadapt.runtime.checks import is_whole

Array = NDArray[Any]
ContentKey = tuple[tuple[str, float], ...]
"""Digests of adapters' tensors with weights: () for the bare base."""


@dataclass(frozen=True, eq=False)
class _Entry:
    """What one text left: int64[length] tokens, and [heads, length, dim] as the cache holds it by cache name."""

    key: ContentKey
    tokens: NDArray[np.int64]
    values: Mapping[str, Array]

    @property
    def size_bytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())


class PrefixCache:
    """Texts' keys and values up to `max_bytes`; those not used for the longest time go first."""

    def __init__(self, max_bytes: int) -> None:
        if not is_whole(max_bytes, 0):
            raise SessionError(
                f"prefix_cache_bytes is {max_bytes!r}", hint="give a whole number of bytes, 0 for no cache"
            )
        self.max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the one used last comes last

    @property
    def size_bytes(self) -> int:
        """How much memory the entries take."""
        return sum(entry.size_bytes for entry in self._entries)

    def restore(self, key: ContentKey, tokens: Sequence[int], row: SharedCache) -> int:
        """Fill a row with the longest known beginning of `tokens`; return its length, at most all tokens but the last.

        Args:
            key: the adapters' content.
            tokens: a prompt. Its last token is always left to be read, since its logits are not kept.
            row: a cache of one row; what it held is overwritten if anything is found.
        """
        wanted = np.asarray(tokens[:-1], np.int64)
        found = [(_common(entry.tokens, wanted), entry) for entry in self._entries if entry.key == key]
        length, best = max(found, key=lambda item: item[0], default=(0, None))
        if best is None or length == 0:
            return 0
        row.write_row(0, best.values, length)
        self._touch(best)
        return length

    def store(self, key: ContentKey, tokens: Sequence[int], row: SharedCache) -> None:
        """Keep what a row of one holds for its first tokens, as much as the budget takes.

        Args:
            key: the adapters' content.
            tokens: at least as many as the row holds.
            row: a cache of one row.
        """
        length = min(int(row.lengths[0]), self.max_bytes // row.bytes_per_token)
        held = np.asarray(tokens[:length], np.int64)
        if not length:
            return
        for entry in [entry for entry in self._entries if entry.key == key]:
            common = _common(entry.tokens, held)
            if common == length:  # there is one that holds all of it
                self._touch(entry)
                return
            if common == len(entry.tokens):
                self._entries.remove(entry)
        self._entries.append(_Entry(key, held, row.read_row(0, length)))
        while self.size_bytes > self.max_bytes:
            self._entries.pop(0)

    def _touch(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self._entries.append(entry)


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if different.size else size
