"""How large keys and values get: what a key-value cache in few bits must have room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.runtime.cache import SharedCache
from edgeadapt.runtime.rows import filled_cache
from edgeadapt.runtime.session import Session

Array = NDArray[Any]
Case = Mapping[str, Array]
RANDOM_CASES, RANDOM_TOKENS = 8, 256
_SEED = 0


def random_cases(vocab_size: int, room: int) -> list[Case]:
    """Return sequences of random tokens, at most `room` each: samples hold few of a vocabulary's words.

    A value that is large for one word alone would be cut off wherever a text has that word.
    """
    generator = np.random.default_rng(_SEED)
    shape = (1, min(RANDOM_TOKENS, room))
    return [{"input_ids": generator.integers(0, vocab_size, shape)} for _ in range(RANDOM_CASES)]


def cache_ranges(
    session: Session, cases: Mapping[str | None, Sequence[Case]], partners: NDArray[np.bool_]
) -> dict[str, NDArray[np.float32]]:
    """Return the largest magnitude of every channel, float32[heads, dim] by cache name ("0.key").

    Of keys it is the largest norm over the channels that the rotary embedding mixes: what the channel would hold at
    another position. Virtual tokens that texts begin with count.

    Args:
        session: over the float model, which knows all adapters of `cases`.
        cases: what each adapter (None: the base) reads, inputs of the decoder.
        partners: bool[dim, dim], which channels of a key are mixed, see `export.rotary`.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for adapter, own in cases.items():
        session.use(adapter)
        for case in own:
            for name, largest in _largest(filled_cache(session, case), partners).items():
                found[name] = np.maximum(found.get(name, largest), largest)
    session.use(None)
    return found


def _largest(cache: SharedCache, partners: NDArray[np.bool_]) -> dict[str, NDArray[np.float32]]:
    found = {}
    mix = partners.astype(np.float32)
    for name, buffer in cache.buffers.items():
        rows = [values[:, :held] for values, held in zip(buffer.numpy(), cache.held, strict=True)]
        values = np.concatenate(rows, axis=1)  # [heads, positions, dim]
        sizes = np.sqrt(np.square(values) @ mix) if name.endswith(".key") else np.abs(values)
        found[name] = sizes.max(axis=1)
    return found
