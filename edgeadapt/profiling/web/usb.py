"""A page of this machine on an Android device: adb carries its port there and opens the browser."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from shlex import quote

from edgeadapt.errors import ProfileError

_CALL_S = 30.0


@contextmanager
def opened_on_android(address: str, port: int, url: str, listen: str | None) -> Iterator[None]:
    """Have the device's browser show `url`; in the end the port is given back.

    Args:
        address: the device, as `adb devices` calls it, or host:port.
        port: of this machine, to be reached on the device's own loopback under the same number.
        url: of the page.
        listen: the address in `url` where it is not this machine's loopback: then the device reaches it by itself.

    Raises:
        ProfileError: if adb is missing, or does not do what it is asked for.
    """
    if ":" in address:
        _adb("connect", address)
    if listen is None:
        _adb("-s", address, "reverse", f"tcp:{port}", f"tcp:{port}", wanted=True)
    try:
        opened = _adb(
            *("-s", address, "shell", f"am start -a android.intent.action.VIEW -d {quote(url)}"),
            wanted=True,
        )
        if "Error" in opened:  # am ends with 0 whatever happens
            raise _refused(address, opened, "open the address in the device's browser yourself")
        yield
    finally:
        if listen is None:
            _adb("-s", address, "reverse", "--remove", f"tcp:{port}")


def _adb(*arguments: str, wanted: bool = False) -> str:
    """Return what adb says; a failure is an error where the call is `wanted`."""
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
    said = f"{done.stdout}{done.stderr}".strip()
    if wanted and done.returncode != 0:
        raise _refused(arguments[1], said, "`adb devices` must show it as `device`: unlock it and tap Allow")
    return said


def _refused(address: str, said: str, hint: str) -> ProfileError:
    last = said.splitlines()[-1] if said else "nothing"
    return ProfileError(f"adb cannot open the page on {address}; it said: {last}", hint=hint)
