"""Starting the measuring program on a device and reading its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from edgeadapt.errors import ProfileError, UnfinishedError
from edgeadapt.profiling.transports import Completed, Transport, files_below

_DEVICE_SIDE = Path(__file__).parent / "device_side"


def program_files(engine: str, packages: Sequence[str] = ()) -> dict[str, Path]:
    """Return the program's files by their names on the device; `packages`: folders that the engine imports from."""
    shared = [f"engines/{path.name}" for path in (_DEVICE_SIDE / "engines").glob("_[!_]*.py")]
    beside = [f"{name}/{path.name}" for name in packages for path in (_DEVICE_SIDE / name).glob("*.py")]
    names = ("runner.py", "system.py", f"engines/{engine}.py", *sorted(shared), *sorted(beside))
    return {name: _DEVICE_SIDE / name for name in names}


def send_job(transport: Transport, folder: Path, engine: str, packages: Sequence[str] = ()) -> str:
    """Copy a job and the program that measures it to the device; return where they lie there."""
    return transport.send({**files_below(folder), **program_files(engine, packages)})


def measure(
    transport: Transport, place: str, what: str, *, install: str, timeout_s: float | None, same_clock: bool
) -> dict[str, Any]:
    """Run one measurement on the device, in a process of its own, and return its samples.

    Args:
        transport: the connection.
        place: what `send_job` returned.
        what: "speed", "memory", "cold", "operators" or "checks".
        install: the command that installs the runtime, for messages.
        timeout_s: how long it may take, None for as long as it needs.
        same_clock: the device's processes read this one's `time.monotonic()`.

    Raises:
        ProfileError: if it takes longer, dies, or the runtime is missing or fails there.
    """
    started = [repr(monotonic())] if same_clock else []
    arguments = [transport.interpreter, "runner.py", ".", what, *started]
    done = transport.run(arguments, cwd=place, timeout_s=timeout_s)
    return answer_of(done, what, install)


def answer_of(done: Completed, what: str, install: str) -> dict[str, Any]:
    """Return the samples in a measuring program's answer.

    Raises:
        ProfileError: with what went wrong there.
    """
    reply = _reply(done.stdout)
    if reply is None:
        last = done.stderr.strip().splitlines()[-5:]
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise ProfileError(
            f"the process that measured {what} {how}: " + " | ".join(last),
            hint="if it was killed, the machine may have too little memory; else please report this",
        )
    if "error" in reply:
        error = reply["error"]
        hint = install if error.get("missing") else error["hint"]
        raise UnfinishedError(error["message"], hint=hint, partial=reply.get("partial") or {})
    result: dict[str, Any] = reply["result"]
    return result


def _reply(stdout: str) -> Mapping[str, Any] | None:
    lines: Sequence[str] = stdout.strip().splitlines()
    try:
        reply = json.loads(lines[-1])
    except (IndexError, ValueError):
        return None
    return reply if isinstance(reply, dict) and ({"result", "error"} & reply.keys()) else None
