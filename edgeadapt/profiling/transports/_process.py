"""Programs of this machine that are ended together with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeadapt.profiling.transports import Completed


def run_process(
    arguments: Sequence[str],
    *,
    cwd: Path | str | None = None,
    stdin: str = "",
    timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Completed:
    """Run a program of this machine and wait for its end; any exception meanwhile ends it and its children.

    Raises:
        subprocess.TimeoutExpired: if it took longer than `timeout_s`; it is gone then.
    """
    try:
        child = start_process(arguments, cwd=cwd, environment=environment, stderr=subprocess.PIPE)
    except (FileNotFoundError, NotADirectoryError) as error:
        return Completed(127, "", f"{arguments[0]}: {error.strerror}")
    except OSError as error:  # not for this processor, or no permission
        return Completed(126, "", f"{arguments[0]}: {error.strerror}")
    try:
        out, err = child.communicate(stdin.encode(), timeout=timeout_s)
    except BaseException:
        end_process(child)
        raise
    return Completed(child.returncode, decoded(out), decoded(err))


def start_process(
    arguments: Sequence[str],
    *,
    stderr: Any,
    cwd: Path | str | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program with pipes, in a session of its own: a Ctrl-C in the terminal reaches this process alone."""
    return subprocess.Popen(
        list(arguments),
        cwd=cwd,
        env=None if environment is None else dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )


def end_process(child: subprocess.Popen[bytes]) -> None:
    """Kill a process of `start_process` and all that it started; close its pipes."""
    if child.returncode is None:  # not yet waited for, so the number is still its own, also if it ended
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        else:  # Windows
            child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            with suppress(OSError):  # what was still to be written
                pipe.close()


def decoded(data: bytes) -> str:
    """Return what a program wrote as text; bytes that are no UTF-8 are marked, not refused."""
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")
