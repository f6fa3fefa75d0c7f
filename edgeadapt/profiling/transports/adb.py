"""An Android device, through the real `adb` of the Android SDK, over USB or the network.

A server of adb that runs already is used and left alone, since only one can hold a USB device; one that had to be
started is ended again, as is a network connection that was made here. Phones come without Python: then the way is
the phone's browser (`--device phone`).
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.transports import Transport, _failures
from edgeadapt.profiling.transports._process import run_process
from edgeadapt.profiling.transports._shell import ShellTransport

# How long a device may take until it is ready: on the first contact somebody has to unlock it and tap "Allow".
READY_S = 20.0
CALL_S = 30.0

# What adb says, what that means, and what to do.
FAILURES = (
    (
        "unauthorized|failed to authenticate",
        "{where} does not trust this computer yet",
        "unlock its screen, tap Allow in the question about USB debugging, and run the command again",
    ),
    (
        "offline",
        "{where} is offline for adb",
        "unlock it and plug it in again; if that does not help: adb kill-server",
    ),
    (
        "[Cc]onnection refused|cannot connect to|failed to connect|unable to connect|No route to host",
        "{where} does not answer adb",
        "switch on wireless debugging on it (Developer options), or `adb tcpip 5555` over USB; check --address",
    ),
    (
        "no permissions",
        "this user may not open {where} over USB",
        "install udev rules (Debian: apt install android-sdk-platform-tools-common) and plug it in again",
    ),
    (
        "not found|no devices",
        "{where} is not connected",
        "plug it in with USB debugging switched on (Developer options); `adb devices` must show it as `device`",
    ),
)


def connect(device: Device) -> Transport:
    """Return a connection to the Android device with the serial or host:port `device.address`, or to the only one.

    Raises:
        ProfileError: if adb is missing, or the device cannot be reached or used.
    """
    return Adb(device)


class Adb(ShellTransport):
    """A shell on the device, its folder, and what has to be undone at the end."""

    def __init__(self, device: Device) -> None:
        program = shutil.which("adb")
        if program is None:
            raise ProfileError("there is no program adb here", hint="install it (Debian: apt install adb)")
        super().__init__(f"{device.name} ({device.address or 'the only one of adb'})")
        self._program = program
        self._undo: list[Sequence[str]] = []
        with self.closed_on_error():
            self._start_server()
            self._serial = device.address or self._only(device)
            if ":" in self._serial:
                self._connect_network()
            self._wait_ready()
            self._check_features()
            browser = ", or let the phone's browser run it: --device phone"
            explained = partial(explain, where=self.where)
            self.open(device, self._shell_line, self._shell_line, explained, without_python=browser)

    def fill(self, folder: str, files: Mapping[str, Path]) -> str | None:
        """Push files one by one into folders made before, which adb does not make for several files."""
        parents = sorted({f"{folder}/{name}".rpartition("/")[0] for name in files})
        made = self.shell.command(f"mkdir -p {shlex.join(parents)}")
        if made.returncode != 0:
            return made.stderr
        for name, path in files.items():
            done = run_process(self._device("push", str(path), f"{folder}/{name}"))
            if done.returncode != 0:
                said = done.stdout + done.stderr
                return "\n".join(re.findall("adb: error: .*", said)) or said  # before a count of files
        return None

    def close(self) -> None:
        """End the keeper, which removes everything, and then what was started of adb."""
        undo, self._undo = self._undo, []
        try:
            super().close()
        finally:
            for arguments in reversed(undo):
                with suppress(ProfileError):
                    self._adb(*arguments)

    def _adb(self, *arguments: str) -> str:
        """Run adb itself and return what it said, to whichever stream: its exit status means little."""
        try:
            done = run_process([self._program, *arguments], timeout_s=CALL_S)
        except subprocess.TimeoutExpired as error:
            raise ProfileError(
                f"adb {arguments[0]} took longer than {CALL_S:g} s",
                hint=f"try by hand: adb {arguments[0]}; if it hangs: adb kill-server",
            ) from error
        return (done.stdout + done.stderr).strip()

    def _start_server(self) -> None:
        """Start adb's server if none runs; it then ends with this transport."""
        said = self._adb("start-server")
        if "started successfully" in said:
            self._undo.append(("kill-server",))
        elif said:
            raise ProfileError(
                f"adb's server does not start: {_failures.reason_in(said)}", hint="try by hand: adb start-server"
            )

    def _device(self, *arguments: str) -> list[str]:
        return [self._program, "-s", self._serial, *arguments]

    def _shell_line(self, line: str) -> list[str]:
        """Return the program that runs a line of shell on the device; without -T a tty would join the two outputs."""
        return self._device("shell", "-T", line)

    def _only(self, device: Device) -> str:
        """Return the serial of the only device."""
        said = self._adb("devices")
        found = re.findall(r"^(\S+)\t", said, re.MULTILINE)
        if len(found) > 1:
            raise ProfileError(
                f"adb knows {len(found)} devices, and which one is the {device.name!r} is not known",
                hint=f"give --address with one of: {', '.join(found)}",
            )
        if not found:
            raise explain("no devices", where=self.where)
        return str(found[0])

    def _connect_network(self) -> None:
        """Make adb's network connection, which the first time says that it failed and then succeeds."""
        said = self._adb("connect", self._serial)
        if "already connected" not in said:
            self._undo.append(("disconnect", self._serial))

    def _wait_ready(self) -> None:
        """Wait until adb calls the device ready, in which case alone commands work.

        Raises:
            ProfileError: if it is not after `READY_S`.
        """
        deadline = time.monotonic() + READY_S
        while (state := self._adb("-s", self._serial, "get-state")) != "device":
            if time.monotonic() > deadline:
                raise explain(f"{self._retry()}\n{state}", where=self.where)
            time.sleep(0.3)
            if "not found" in state:
                self._retry()

    def _retry(self) -> str:
        return self._adb("connect", self._serial) if ":" in self._serial else ""

    def _check_features(self) -> None:
        """Check that exit statuses come back, which the shell of an old Android does not send."""
        if "shell_v2" not in self._adb("-s", self._serial, "features").split():
            raise ProfileError(
                f"the adb of {self.where} tells no exit status (before Android 7)", hint="use a newer Android"
            )


def explain(text: str, *, where: str) -> ProfileError:
    """Return the error for what adb said when a device was not to be had."""
    reason = _failures.reason_in(text)
    for pattern, message, hint in FAILURES:
        if re.search(pattern, text):
            return ProfileError(f"{message.format(where=where)} ({reason})", hint=hint)
    return ProfileError(f"adb does not reach {where}: {reason}", hint="try by hand: adb devices")
