"""How much memory this process holds, as its operating system says it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

_SELF = Path("/proc/self")


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one process; None where the system does not say it.

    resident_bytes: pages in memory now; peak_resident_bytes: the most so far
    proportional_bytes: as resident_bytes, but a page that n processes share counts as 1/n (PSS)
    """

    resident_bytes: int | None
    peak_resident_bytes: int | None
    proportional_bytes: int | None


def memory_now(process: Path = _SELF) -> MemoryUse:
    """Return this process's memory (`process`: its folder in /proc)."""
    status = _read(process / "status")
    peak = status.get("VmHWM")
    return MemoryUse(
        resident_bytes=status.get("VmRSS"),
        peak_resident_bytes=_peak_by_rusage() if peak is None and process == _SELF else peak,
        proportional_bytes=_read(process / "smaps_rollup").get("Pss"),
    )


def _read(path: Path) -> dict[str, int]:
    """Return the "Name:  123 kB" lines of a file in /proc in bytes, {} where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found


def _peak_by_rusage() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
