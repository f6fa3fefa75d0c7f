"""The measurements themselves; they run in a child process (see child.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from edgeadapt.profiling.memory import MemoryUse, memory_now
from edgeadapt.profiling.samples import percentile, timed
from edgeadapt.profiling.workload import Workload, example_inputs, writer
from edgeadapt.runtime import Session

_RUNS_PER_REPEAT = 10
"""A single pass is repeated so often as a decoder writes one answer, for percentiles that mean something."""
_SWAPS = 10
_TAX_STEPS = 16


@dataclass(frozen=True)
class Speed:
    """Raw samples in seconds; None where a model has no such thing.

    ttft_s: from the call with the prompt to the first token; latency_s: per token, or per run of a single pass
    tax_base_s, tax_adapter_s: time per token (median of a block) or run, in neighbouring pairs without and with it
    swap_resident_s, swap_disk_s: from the call to a session that is ready, adapter in memory or only on disk
    """

    load_time_s: float
    first_run_s: float
    ttft_s: tuple[float, ...] | None
    latency_s: tuple[float, ...]
    tax_base_s: tuple[float, ...] | None
    tax_adapter_s: tuple[float, ...] | None
    swap_resident_s: tuple[float, ...] | None
    swap_disk_s: tuple[float, ...] | None


@dataclass(frozen=True)
class MemoryStages:
    """Memory after each stage of a process's life.

    before_load: after imports; after_load: graphs and the adapter opened; after_run: after one run or answer
    further_adapters: after each further adapter was used too, by name, in order
    """

    before_load: MemoryUse
    after_load: MemoryUse
    after_run: MemoryUse
    further_adapters: dict[str, MemoryUse]


def measure_speed(
    open_session: Callable[[], Session], workload: Workload, adapter: str | None, other: str | None
) -> Speed:
    """Return samples of everything that is timed.

    Args:
        open_session: opens the bundle.
        workload: how much is run.
        adapter: what is active in the main figures.
        other: the adapter whose tax and swap are measured against the base, None for neither.
    """
    start = perf_counter()
    session = open_session()
    session.use(adapter)
    load_time_s = perf_counter() - start
    with session:
        block = _decoder_block if session.spec is not None else _single_pass_block
        first_run_s, ttft_s, latency_s = block(session, workload)
        base, adapted = (None, None) if other is None else _tax(session, workload, other)
        resident, disk = (None, None) if other is None else _swap(session, other)
    return Speed(load_time_s, first_run_s, ttft_s, latency_s, base, adapted, resident, disk)


def _decoder_block(session: Session, workload: Workload) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    work = writer(session, workload)
    first_run_s = timed(work.start)
    ttft: list[float] = []
    latencies: list[float] = []
    for _ in range(workload.repeats):
        start = perf_counter()
        cache, logits = work.start()
        now = perf_counter()
        ttft.append(now - start)
        for _ in range(workload.new_tokens):
            logits = work.step(cache, logits)
            before, now = now, perf_counter()
            latencies.append(now - before)
    return first_run_s, tuple(ttft), tuple(latencies)


def _single_pass_block(session: Session, workload: Workload) -> tuple[float, None, tuple[float, ...]]:
    inputs = example_inputs(session, None, workload)
    first_run_s = timed(lambda: session.run(inputs))
    runs = workload.repeats * _RUNS_PER_REPEAT
    return first_run_s, None, tuple(timed(lambda: session.run(inputs)) for _ in range(runs))


def _tax(session: Session, workload: Workload, adapter: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Time blocks without and with the adapter in turn, each side first every other time."""
    samples: dict[str | None, list[float]] = {None: [], adapter: []}
    with _restored(session):
        runs = {}
        for choice in (None, adapter):
            session.use(choice)
            runs[choice] = _block(session, workload)
            runs[choice]()  # warm: opens the graph and touches its memory
        for repeat in range(workload.repeats * 2):
            for choice in (None, adapter) if repeat % 2 == 0 else (adapter, None):
                session.use(choice)
                samples[choice].append(runs[choice]())
    return tuple(samples[None]), tuple(samples[adapter])


def _block(session: Session, workload: Workload) -> Callable[[], float]:
    """Return what runs one block with the adapter that is active then, and gives the median time of its steps."""
    if session.spec is None:
        inputs = example_inputs(session, None, workload)
        return lambda: timed(lambda: session.run(inputs))
    work = writer(session, workload)
    steps = min(_TAX_STEPS, workload.new_tokens)

    def run() -> float:
        cache, logits = work.start()
        taken = []
        for _ in range(steps):
            start = perf_counter()
            logits = work.step(cache, logits)
            taken.append(perf_counter() - start)
        return percentile(taken, 50)

    return run


def _swap(session: Session, adapter: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    resident: list[float] = []
    disk: list[float] = []
    with _restored(session):
        session.use(adapter)
        for _ in range(_SWAPS):
            session.use(None)
            resident.append(timed(lambda: session.use(adapter)))
            session.use(None)
            session.evict(adapter)
            disk.append(timed(lambda: session.use(adapter)))
    return tuple(resident), tuple(disk)


@contextmanager
def _restored(session: Session) -> Iterator[None]:
    active = session.adapter
    try:
        yield
    finally:
        session.use(active)


def measure_memory(
    open_session: Callable[[], Session], workload: Workload, adapter: str | None, others: tuple[str, ...]
) -> MemoryStages:
    """Return this process's memory after each stage; call it in a process that did nothing before.

    Args:
        open_session: opens the bundle.
        workload: what is run once per stage.
        adapter: what is active first.
        others: adapters that are used after it, one after the other.
    """
    before = memory_now()
    session = open_session()
    session.use(adapter)
    loaded = memory_now()
    with session:
        run = _once(session, workload)
        run()
        ran = memory_now()
        further = {}
        for name in others:
            session.use(name)
            run()
            further[name] = memory_now()
    return MemoryStages(before, loaded, ran, further)


def _once(session: Session, workload: Workload) -> Callable[[], Any]:
    if session.spec is None:
        inputs = example_inputs(session, None, workload)
        return lambda: session.run(inputs)
    work = writer(session, workload)

    def run() -> None:
        cache, logits = work.start()
        for _ in range(workload.new_tokens):
            logits = work.step(cache, logits)

    return run
