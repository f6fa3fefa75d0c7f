"""How many threads are fastest here, by measurement: cores may be shared, slow, or two on one core."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgeadapt.errors import SessionError

if TYPE_CHECKING:
    from edgeadapt.runtime.session import Session

_RUNS = 12
_PAST_TOKENS = 32
_WORTH = 0.03
"""More threads must save this share of the time: they are taken from whatever else runs."""


def measured_threads(open_with: Callable[[int], Session]) -> int:
    """Return the number of threads with which a decoder's step, or the run of an adapter's golden input, is fastest.

    Args:
        open_with: opens the session with so many threads; each is closed again before the next is opened.

    Raises:
        SessionError: if the bundle is no decoder and has no adapter, whose golden input could be run.
    """
    return fewest_of_the_fastest({threads: _median_s(open_with, threads) for threads in _candidates()})


def fewest_of_the_fastest(seconds: Mapping[int, float]) -> int:
    """Return the fewest threads that take hardly longer than the fastest."""
    limit = min(seconds.values()) * (1 + _WORTH)
    return min(threads for threads, took in seconds.items() if took <= limit)


def _candidates() -> Sequence[int]:
    """Return 1, 2, 4 and so on up to the cores that this process may use, and those."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({cores, *(1 << power for power in range(cores.bit_length()) if 1 << power <= cores)})


def _median_s(open_with: Callable[[int], Session], threads: int) -> float:
    with open_with(threads) as session:
        work = _work(session)
        work()
        took = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            work()
            took.append(time.perf_counter() - start)
    return statistics.median(took)


def _work(session: Session) -> Callable[[], object]:
    if session.spec is not None and not session.has_encoder:
        past = min(_PAST_TOKENS, session.spec.max_length - _RUNS - 1)
        cache = session.new_cache(1, past + _RUNS + 1)
        session.step(np.ones((1, past), np.int64), cache, logits="none")
        return lambda: session.step([[1]], cache, logits="last")
    names = session.bundle.adapter_names
    if not names:
        raise SessionError(
            "threads is 'measure', but this bundle has no adapter whose golden input could be run",
            hint="give a number of threads, or None for one per core",
        )
    inputs = session.bundle.golden(names[0]).inputs
    return lambda: session.run(inputs)
