"""A page of this machine on an Android device: adb carries its port there and opens the browser."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from shlex import quote

from edgeadapt.errors import ProfileError

_CALL_S = 30.0
_READY_S = 20.0
"""On the first contact somebody has to unlock the device and tap "Allow"."""
_PORT = 5037


@contextmanager
def opened_on_android(address: str, port: int, url: str, listen: str | None) -> Iterator[None]:
    """Have the device's browser show `url`; in the end the port is given back.

    A server of adb that runs already is left alone; one that had to be started is ended again.

    Args:
        address: the device, as `adb devices` calls it, or host:port.
        port: of this machine, to be reached on the device's own loopback under the same number.
        url: of the page.
        listen: the address in `url` where it is not this machine's loopback: then the device reaches it by itself.

    Raises:
        ProfileError: if adb is missing, or does not do what it is asked for.
    """
    started = not _serves()
    try:
        _wait_ready(address)
        if listen is None:
            _wanted(address, "reverse", f"tcp:{port}", f"tcp:{port}")
        opened = _wanted(address, "shell", f"am start -a android.intent.action.VIEW -d {quote(url)}")
        if "Error" in opened:  # am ends with 0 whatever happens
            raise _refused(address, opened, "open the address in the device's browser yourself")
        yield
    finally:
        if listen is None:
            _adb("-s", address, "reverse", "--remove", f"tcp:{port}")
        if started:
            _adb("kill-server")


def _wait_ready(address: str) -> None:
    """Wait until adb calls the device ready: the first contact over the network fails, and succeeds a moment later."""
    deadline = time.monotonic() + _READY_S
    while True:
        said = _adb("connect", address)[1] if ":" in address else ""
        status, state = _adb("-s", address, "get-state")
        if (status, state) == (0, "device"):
            return
        waits = ":" in address or "unauthorized" in state
        if not waits or time.monotonic() > deadline:
            hint = "`adb devices` must show it as `device`: plug it in, unlock it, and allow USB debugging"
            raise _refused(address, f"{said}\n{state}", hint)
        time.sleep(0.3)


def _wanted(address: str, *arguments: str) -> str:
    """Return what adb says of the device; a failure is an error."""
    status, said = _adb("-s", address, *arguments)
    if status != 0:
        raise _refused(address, said, "unlock the device, plug it in again and run the command again")
    return said


def _adb(*arguments: str) -> tuple[int, str]:
    """Return adb's exit status and what it says."""
    program = shutil.which("adb")
    if program is None:
        raise ProfileError("there is no program adb here", hint="install it (Debian: apt install adb)")
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, errors="replace", timeout=_CALL_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ProfileError(
            f"adb {' '.join(arguments[:3])} took longer than {_CALL_S:g} s",
            hint="unlock the device and look for a question on its screen; else: adb kill-server",
        ) from error
    return done.returncode, f"{done.stdout}{done.stderr}".strip()


def _serves() -> bool:
    """Return whether a server of adb runs on this machine."""
    try:
        with socket.create_connection(("127.0.0.1", int(os.environ.get("ANDROID_ADB_SERVER_PORT", _PORT))), timeout=1):
            return True
    except (OSError, ValueError):
        return False


def _refused(address: str, said: str, hint: str) -> ProfileError:
    last = said.strip().splitlines()[-1] if said.strip() else "nothing"
    return ProfileError(f"adb cannot open the page on {address}; it said: {last}", hint=hint)
