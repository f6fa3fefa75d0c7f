"""Which Python a device has, and whether the device is what its file says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.transports import Completed, _failures

OLDEST = (3, 10)

_PROBE = "import json, platform, sys, numpy; print(json.dumps([platform.machine(), *sys.version_info[:2]]))"


def machine_of(
    interpreter: str, where: str, run: Callable[[Sequence[str]], Completed], *, without_python: str = ""
) -> str:
    """Return what `uname -m` says to a device's Python: another answer than its system's means an emulator.

    Args:
        interpreter: the Python, by name or path on the device.
        where: the device in messages.
        run: runs a program there.
        without_python: what else can be done where there is none, for the hint.

    Raises:
        ProfileError: if it is missing, no Python, too old, or without numpy.
    """
    done = run([interpreter, "-c", _PROBE])
    if done.returncode in (126, 127):
        raise ProfileError(
            f"{where} has no program {interpreter!r} to run ({_failures.reason_in(done.stderr)})",
            hint=f"install Python and numpy there, name another one with --interpreter{without_python}",
        )
    if "No module named 'numpy'" in done.stderr:
        raise ProfileError(
            f"the Python {interpreter!r} of {where} has no numpy",
            hint=f"install it there: {interpreter} -m pip install numpy, or name another Python with --interpreter",
        )
    machine, major, minor = _answer(done, interpreter, where)
    if (major, minor) < OLDEST:
        raise ProfileError(
            f"the Python {interpreter!r} of {where} is {major}.{minor}",
            hint=f"install {OLDEST[0]}.{OLDEST[1]} or newer there, and name it with --interpreter",
        )
    return str(machine)


def check_machine(device: Device, machine: str, where: str) -> None:
    """Check that the device is of the architecture that its file says.

    Raises:
        ProfileError: naming both.
    """
    if device.machine is not None and device.machine != machine:
        raise ProfileError(
            f"device {device.name!r} is an {device.machine} machine, and {where} is {machine}",
            hint="give the address of the right machine, another --device, or another Python with --interpreter",
        )


def _answer(done: Completed, interpreter: str, where: str) -> Any:
    try:
        machine, major, minor = json.loads(done.stdout if done.returncode == 0 else "")
    except (ValueError, TypeError):
        raise ProfileError(
            f"{interpreter!r} of {where} does not run as Python: {_failures.reason_in(done.stderr or done.stdout)}",
            hint="name a Python with --interpreter",
        ) from None
    return machine, major, minor
