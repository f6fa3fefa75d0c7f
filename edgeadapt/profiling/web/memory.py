"""The memory of a page, read from the processes of the browser that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgeadapt.profiling.device_side.system import memory_now

Use = dict[str, int | None]
_PROC = Path("/proc")


class PageMemory:
    """What a page takes beyond an empty one, which the first call measures.

    A browser has several renderers; the page's is the one that grew most since then. With WebGPU much of what is
    measured lies in the process that talks to the GPU, whose growth is added.
    """

    def __init__(self, pid: int, *, gpu: bool, proc: Path = _PROC) -> None:
        self._pid, self._gpu, self._proc = pid, gpu, proc
        self._empty: dict[int, Use] | None = None
        self._highest = 0

    def __call__(self) -> Use | None:
        """Return the figures of `memory_now`, or None where there is no /proc."""
        kinds = dict(processes_below(self._pid, self._proc))
        uses = {pid: memory_now(self._proc / str(pid)) for pid in kinds}
        if self._empty is None:
            self._empty = uses
        grown = {pid: _less(use, self._empty.get(pid)) for pid, use in uses.items()}
        pages = [use for pid, use in grown.items() if kinds[pid] == "renderer"]
        if not pages:
            return None
        found = max(pages, key=lambda use: use["resident_bytes"] or 0)
        for pid, use in grown.items():
            if self._gpu and kinds[pid] == "gpu-process":
                found = {name: _sum(value, use[name]) for name, value in found.items()}
        peak = found["peak_resident_bytes"]
        if peak is None:
            return found
        self._highest = max(self._highest, peak)  # the kernel's is a sum of counters that lag behind
        return {**found, "peak_resident_bytes": self._highest}


def _less(use: Use, empty: Use | None) -> Use:
    """Return how much more `use` is; of a peak, what lies above the empty page's memory of that time."""
    if empty is None:
        return use
    before = {**empty, "peak_resident_bytes": empty["resident_bytes"]}
    return {name: _sum(value, before[name], -1) for name, value in use.items()}


def _sum(one: int | None, other: int | None, sign: int = 1) -> int | None:
    return None if one is None or other is None else one + sign * other


def processes_below(pid: int, proc: Path = _PROC) -> Iterator[tuple[int, str]]:
    """Give the processes that come from `pid`, with what their `--type=` says."""
    parents = {}
    for stat in proc.glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # it is gone
            continue
        parents[int(stat.parent.name)] = int(text.rpartition(")")[2].split()[1])  # man 5 proc_pid_stat
    for child in sorted(parents):
        above = parents[child]
        while above not in (pid, 0) and above in parents:
            above = parents[above]
        if above == pid:
            yield child, _kind(proc / str(child) / "cmdline")


def _kind(cmdline: Path) -> str:
    try:
        words = cmdline.read_bytes().decode("utf-8", "replace").replace("\0", " ").split()
    except OSError:
        return ""
    return next((word.removeprefix("--type=") for word in words if word.startswith("--type=")), "browser")
