"""A device that exists only as a folder here, and fails when it is told to: for tests of what uses a transport.

Programs really run, on this machine. A device whose file names another kind of machine only claims to be one, so its
times are nobody's.
`address` says which call fails and how: "run:2:lost" loses the device in the second `run`, "send:1:full" finds its
disk full. Several are separated by commas; the failures are the ones that real devices have, in the same words.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.transports import Completed, Transport, _failures
from edgeadapt.profiling.transports._folder import FolderTransport

_FORM = 'give --address "CALL:NUMBER:FAILURE", such as run:2:lost; CALL is one of send, run, close'


def connect(device: Device) -> Transport:
    """Return a simulated device that fails as `device.address` says, or never.

    Raises:
        ProfileError: if the address asks for a failure that there is not.
    """
    return Simulated(device)


class Simulated(FolderTransport):
    """A folder and this machine's Python, in the role of any device.

    calls: every call so far, as ("run", "runner.py"), for a test to look at
    """

    def __init__(self, device: Device) -> None:
        self._planned = _planned(device.address)
        super().__init__(device.name)
        self.where = f"{device.name} (simulated)"
        self.interpreter = device.interpreter or sys.executable
        self.machine = device.machine or platform.machine()
        self.emulated = self.machine != platform.machine()
        self.calls: list[tuple[str, ...]] = []
        self._lost = False

    def send(self, files: Mapping[str, Path]) -> str:
        """Copy files, or fail."""
        failure = self._next("send", *files)
        if failure == "full":
            raise _failures.not_written(files, f"{self.folder}/1", self.where, "No space left on device")
        return super().send(files)

    def run(self, arguments: Sequence[str], *, cwd: str, stdin: str = "", timeout_s: float | None = None) -> Completed:
        """Run a program, or fail."""
        failure = self._next("run", *arguments)
        if failure == "late":
            raise _failures.too_slow(arguments, self.where, timeout_s or 0)
        if failure == "killed":
            return Completed(-9, "", "")
        if failure == "garbled":
            return Completed(0, '{"result": {"sch', "")
        return super().run(arguments, cwd=cwd, stdin=stdin, timeout_s=timeout_s)

    def close(self) -> None:
        """Remove the folder, or say that this is unsure."""
        if self.folder.exists():
            failure = self._next("close", checked=False)
            super().close()
            if failure == "unsure":
                raise _failures.left_behind(str(self.folder), self.where)

    def _next(self, call: str, *arguments: str, checked: bool = True) -> str | None:
        """Note a call; return the failure that is planned for it, or raise the one of a lost device."""
        self.calls.append((call, *arguments))
        number = sum(noted[0] == call for noted in self.calls)
        failure = self._planned.get((call, number))
        self._lost = self._lost or failure == "lost"
        if self._lost and checked:
            raise _failures.lost(self.where)
        return failure


_KINDS: dict[str, tuple[str, ...]] = {
    "send": ("lost", "full"),
    "run": ("lost", "late", "killed", "garbled"),
    "close": ("unsure",),
}


def _planned(address: str | None) -> dict[tuple[str, int], str]:
    """Return the failure of each call, by its name and number among calls of that name, from 1."""
    planned: dict[tuple[str, int], str] = {}
    for item in address.split(",") if address is not None else ():
        call, _, rest = item.partition(":")
        number, _, failure = rest.partition(":")
        if call not in _KINDS or not number.isdecimal() or int(number) < 1:
            raise ProfileError(f"{item!r} is no failure of a simulated device", hint=_FORM)
        if failure not in _KINDS[call]:
            raise ProfileError(
                f"a simulated {call} does not fail as {failure!r}", hint=f"known: {', '.join(_KINDS[call])}"
            )
        planned[call, int(number)] = failure
    return planned
