"""What else the machine did while something was measured, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FOREIGN_LIMIT = 0.05
STEAL_LIMIT = 0.01
PROC = Path("/proc")


@dataclass(frozen=True)
class Snapshot:
    """Counters at one moment; ticks are 1/100 s.

    all_ticks, idle_ticks, steal_ticks: of all cores; own_ticks: used by the measured processes and the harness
    pressure_us: time in which some task waited for a core; switches: involuntary ones of the measured processes
    """

    all_ticks: int
    idle_ticks: int
    steal_ticks: int
    own_ticks: int
    pressure_us: int | None
    switches: int


@dataclass(frozen=True)
class Noise:
    """What went on between two snapshots.

    foreign_share: share of all cores' time that other processes used; steal_share: that the hypervisor took
    pressure_share: share of the time in which some task waited for a core; None where the system does not say
    involuntary_switches: how often a measured process lost its core; load_average: of the last minute, at the end
    """

    foreign_share: float
    steal_share: float
    pressure_share: float | None
    involuntary_switches: int
    load_average: float
    seconds: float

    @property
    def noisy(self) -> bool:
        """Whether samples of this time should be taken again."""
        return self.foreign_share > FOREIGN_LIMIT or self.steal_share > STEAL_LIMIT


def snapshot(pids: Iterable[int], proc: Path = PROC) -> Snapshot:
    """Read the counters; `pids` are the measured processes, the harness itself is added."""
    words = [int(word) for word in (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    own = switches = 0
    for pid in {*pids, os.getpid()}:
        own += _ticks(proc / str(pid))
        switches += _switches(proc / str(pid))
    return Snapshot(sum(words), words[3] + words[4], words[7], own, _pressure(proc), switches)


def between(before: Snapshot, after: Snapshot, seconds: float) -> Noise:
    """What happened from one snapshot to the next."""
    total = max(after.all_ticks - before.all_ticks, 1)
    steal = after.steal_ticks - before.steal_ticks
    busy = total - (after.idle_ticks - before.idle_ticks) - steal
    pressure = None
    if before.pressure_us is not None and after.pressure_us is not None:
        pressure = (after.pressure_us - before.pressure_us) / 1e6 / max(seconds, 1e-9)
    return Noise(
        foreign_share=max(busy - (after.own_ticks - before.own_ticks), 0) / total,
        steal_share=steal / total,
        pressure_share=pressure,
        involuntary_switches=after.switches - before.switches,
        load_average=os.getloadavg()[0],
        seconds=seconds,
    )


def _ticks(process: Path) -> int:
    try:
        # The name, in brackets, may hold anything; utime and stime are the 12th and 13th word behind it.
        words = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0
    return int(words[11]) + int(words[12])


def _switches(process: Path) -> int:
    found = 0
    for status in (process / "task").glob("*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:  # the thread has ended
            continue
        found += sum(int(line.split()[1]) for line in lines if line.startswith("nonvoluntary_ctxt_switches:"))
    return found


def _pressure(proc: Path) -> int | None:
    try:
        line = (proc / "pressure" / "cpu").read_text().split("\n", 1)[0]
    except OSError:
        return None
    return int(line.rpartition("total=")[2]) if line.startswith("some") else None
