"""One measured process: an engine with one configuration in one form, asked over a pipe, watched through /proc."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
LIMIT_S = 300
"""The longest that one request may take."""


SETTLED_LOOKS, LOOK_S, SETTLE_LIMIT_S = 3, 0.003, 1.0


class SideError(Exception):
    """What a child reported, or how it ended."""


@dataclass
class Side:
    """What a process is started from.

    engine: the file's name in engines/; configuration: a key of its CONFIGURATIONS
    adapter: the adapter that is active when it is measured, None for the bare base
    adapters: all that are there to be swapped to, name to PEFT folder; empty for the plain form
    note: what else distinguishes it, such as a second process for the A/A control
    promoted: the adapter is in weights of its own (edgeadapt only); environment: further variables of the process
    """

    engine: str
    module: ModuleType
    configuration: str
    python: Path
    folder: Path
    threads: int
    adapter: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    note: str = ""
    promoted: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    @property
    def name(self) -> str:
        """A name for tables and files, such as "edgeadapt int8, sql"."""
        state = self.note or self.adapter or "base"
        return f"{self.engine} {self.configuration}, {state}"

    @property
    def active(self) -> str | None:
        """What the engine is asked to make active."""
        return f"promoted:{self.adapter}" if self.promoted else self.adapter

    def launch(self, logs: Path) -> None:
        """Start the process; nothing is loaded yet."""
        command = [str(self.python), str(HERE / "child.py"), str(self.module.__file__)]
        # Every engine runs with its own defaults, so nothing of the caller's tuning may reach it; and its modules are
        # compiled once, as an installation does it.
        callers = ("OMP_", "GOMP_", "KMP_", "MKL_", "PYTHONDONTWRITEBYTECODE")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(callers)}
        environment |= {"EDGEADAPT_CACHE_DIR": str(logs.parent / "cache"), **self.environment}
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / f"{re.sub('[^a-zA-Z0-9_]+', '-', self.name)}.log").open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )

    def load(self) -> dict[str, Any]:
        """Open the model; the adapter is made active at the next request."""
        return self.ask(
            do="load",
            configuration=self.configuration,
            folder=str(self.folder),
            threads=self.threads,
            adapters=self.adapters,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            SideError: if the child reports an error, dies, or takes too long.
        """
        process = self.process
        if process is None or process.stdin is None or process.stdout is None:
            raise SideError("was not started")
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except OSError as error:
            raise SideError(f"cannot be asked: it ended with {process.poll()}") from error
        if not select.select([process.stdout], [], [], LIMIT_S)[0]:
            process.kill()
            raise SideError(f"no answer to {request['do']!r} within {LIMIT_S} s")
        line = process.stdout.readline()
        if not line:
            raise SideError(f"ended with {process.wait(30)} during {request['do']!r}")
        settle(process.pid)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer

    def pid(self) -> int:
        """The process's id."""
        if self.process is None:
            raise SideError("was not started")
        return self.process.pid

    def close(self) -> None:
        """End the process, gently first."""
        process, self.process = self.process, None
        if process is None:
            return
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def settle(pid: int, proc: Path = Path("/proc")) -> float:
    """Wait until no thread of a process wants to run, for a second at most; the seconds that took.

    Thread pools spin for tens of milliseconds after their last work: on a core that the next engine is timed on. An A/A
    control was off by 19 % without this.
    """
    started, quiet = time.monotonic(), 0
    while quiet < SETTLED_LOOKS and time.monotonic() - started < SETTLE_LIMIT_S:
        quiet = 0 if _wants_to_run(proc / str(pid)) else quiet + 1
        time.sleep(LOOK_S)
    return time.monotonic() - started


def _wants_to_run(process: Path) -> bool:
    for stat in (process / "task").glob("*/stat"):
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except OSError:  # the thread has ended
            continue
        if state == "R":
            return True
    return False
