"""The present machine as a device, measured: memory, arithmetic in float32 and int8, what an operator costs."""

from __future__ import annotations

import datetime as dt
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeadapt.device import Device
from edgeadapt.profiling import probe_graphs
from edgeadapt.profiling.assemble import disturbances
from edgeadapt.profiling.device_side import system
from edgeadapt.profiling.figures import Noise
from edgeadapt.progress import SILENT, Progress
from edgeadapt.runtime import ort

_SECONDS = 1.0
"""How long each thing is tried; the fastest try counts: what disturbs makes it slower, never faster."""
_FEWEST_RUNS = 5
_PART = 4 << 20
"""Numbers of four bytes that a thread reads at once."""
_UNDISTURBED = 10
"""Percentile of the times of parts that counts."""
_ROWS = 128
_CHAINS = (50, 450)
_CACHES = 4
"""What is streamed is so many times as large as the last-level cache."""
_UNKNOWN_CACHE_BYTES = 64 << 20
_LARGEST_SHARE = 0.25
"""Of the memory that is free, for what is streamed."""
Clock = Callable[[], float]
_INSTRUCTION_SETS = re.compile(r"(sse4_[12]|avx.*|f16c|fma|amx_.*)$")


@dataclass(frozen=True)
class Detected:
    """The present machine; `warnings`: what disturbed the measurements."""

    device: Device
    warnings: tuple[str, ...]


def detect_device(
    name: str,
    *,
    threads: int | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress = SILENT,
    proc: Path = system.PROC,
    sys: Path = system.SYS,
) -> Detected:
    """Return the present machine with the rates that it reaches. What it does not say is left out.

    Args:
        name: of the device.
        threads: with how many it is measured, None for one per core; a number is kept in the device.
        clock: tells seconds; with one thread `time.process_time` leaves out when others had the core.
        progress: is told what goes on.
        proc: where Linux says what it knows of processes and processors.
        sys: where it says what it knows of hardware.
    """
    facts = system.host_facts(proc)
    meter = system.NoiseMeter(proc)
    cores = system.available_cores()
    used = threads or cores
    with progress.stage("measure memory"):
        bandwidth = memory_bandwidth(used, _streamed_bytes(proc, sys), clock)
    with progress.stage("measure arithmetic"):
        float32 = _operations_per_s(probe_graphs.float32_product(), used, clock)
        int8 = _operations_per_s(probe_graphs.int8_product(), used, clock)
    with progress.stage("measure operators"):
        overhead = _operator_overhead_s(used, clock)
    device = Device(
        name=name,
        title=facts["cpu"] or f"a machine with {cores} cores",
        provider="cpu",
        threads=threads,
        machine=facts["machine"],
        operating_system=facts["system"],
        cores=cores,
        cpu_features=cpu_features(proc),
        clock_hz=_clock_hz(sys),
        memory_bytes=facts["memory_bytes"],
        memory_bandwidth_bytes_per_s=_rounded(bandwidth),
        peak_flops_float32=_rounded(float32),
        peak_ops_int8=_rounded(int8),
        operator_overhead_s=_rounded(overhead),
        measured=True,
        sources=(f"measured with ONNX Runtime {ort.version()} and {used} threads on {dt.datetime.now(dt.UTC).date()}",),
    )
    return Detected(device, disturbances(Noise(**meter.read())))


def memory_bandwidth(threads: int, size_bytes: int, clock: Clock = time.perf_counter) -> float:
    """Return how many bytes a second `threads` threads read together, from arrays of `size_bytes` in all.

    They go through the arrays in parts, one of each thread at a time, again and again: whole rounds would be disturbed
    more often than not where others use the machine too, and no part is still in a cache when its turn comes again.
    """
    arrays = [np.ones(max(size_bytes // threads // 4, _PART), np.int32) for _ in range(threads)]
    starts = range(0, arrays[0].size - _PART + 1, _PART)
    samples: list[float] = []
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of Python's lock while it works

        def read(start: int) -> float:
            parts = [array[start : start + _PART] for array in arrays]
            before = clock()
            list(pool.map(np.max, parts))
            return clock() - before

        end = time.perf_counter() + _SECONDS
        while len(samples) < _FEWEST_RUNS or time.perf_counter() < end:
            samples += [read(start) for start in starts]
    return threads * 4 * _PART / float(np.percentile(samples, _UNDISTURBED))


def cpu_features(proc: Path = system.PROC) -> tuple[str, ...]:
    """Return instruction sets as Linux names them, on x86 those for vectors alone; empty where it does not say."""
    try:
        lines = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return tuple(word for word in value.split() if _INSTRUCTION_SETS.match(word))
        if key.strip() == "Features":
            return tuple(value.split())
    return ()


def last_level_cache_bytes(sys: Path = system.SYS) -> int | None:
    """Return the size of the largest cache of the first core, None where the system does not say it."""
    sizes = []
    for file in (sys / "devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", file.read_text(encoding="utf-8").strip())
        if found:
            sizes.append(int(found[1]) << {"K": 10, "M": 20}[found[2]])
    return max(sizes, default=None)


def _streamed_bytes(proc: Path, sys: Path) -> int:
    wanted = _CACHES * (last_level_cache_bytes(sys) or _UNKNOWN_CACHE_BYTES)
    free = system.free_memory_bytes(proc)
    return wanted if free is None else min(wanted, int(free * _LARGEST_SHARE))


def _operations_per_s(model: bytes, threads: int, clock: Clock) -> float:
    """Return multiplications and additions a second of a product with _ROWS rows."""
    rows = np.random.default_rng(0).standard_normal((_ROWS, probe_graphs.WIDTH), np.float32)
    return 2 * rows.size * probe_graphs.WIDTH / _run_s(model, rows, threads, clock)


def _operator_overhead_s(threads: int, clock: Clock) -> float:
    """Return what one more operator adds: the difference of two chains."""
    row = np.ones((1, probe_graphs.CHAIN_WIDTH), np.float32)
    short, long = (_run_s(probe_graphs.chain(length), row, threads, clock) for length in _CHAINS)
    return max(long - short, 1e-9) / (_CHAINS[1] - _CHAINS[0])


def _run_s(
    model: bytes, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], threads: int, clock: Clock
) -> float:
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        path = Path(folder) / "probe.onnx"
        path.write_bytes(model)
        graph = ort.open_graph(path, threads=threads)
        binding = ort.Binding(graph, {})
        binding.set_input(probe_graphs.INPUT, ort.Tensor(values))
        binding.set_output("y", ort.Tensor(np.empty_like(values)))
        return _fastest_s(binding.run, clock)


def _fastest_s(work: Callable[[], object], clock: Clock) -> float:
    work()
    best, runs, end = float("inf"), 0, time.perf_counter() + _SECONDS
    while runs < _FEWEST_RUNS or time.perf_counter() < end:
        start = clock()
        work()
        best, runs = min(best, clock() - start), runs + 1
    return best


def _clock_hz(sys: Path) -> float | None:
    """Return the highest clock of any core, None where the system does not say it."""
    found = []
    for file in (sys / "devices/system/cpu").glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq"):
        text = file.read_text(encoding="utf-8").strip()
        if text.isdigit():
            found.append(1e3 * int(text))
    return max(found, default=None)


def _rounded(value: float) -> float:
    """Return three significant digits: more would not come again."""
    return float(f"{value:.3g}")
