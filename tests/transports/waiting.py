"""Waiting for what other processes do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 60.0


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until something holds; the machine may be busy, so the end is far."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def pids_in(file: Path) -> list[int]:
    """Return the process ids that programs.HANG wrote, once they are there."""
    wait_until(file.exists, f"{file} was written")
    pids = [int(word) for word in file.read_text().split()]
    assert len(pids) == 2
    assert os.getpid() not in pids
    return pids
