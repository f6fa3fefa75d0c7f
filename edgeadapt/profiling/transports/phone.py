"""A phone's or tablet's browser, in which somebody opens a page: no file and no command reaches it another way.

The runtime `web` measures through it; see `edgeadapt.profiling.phone`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.transports import Completed, Transport


def connect(device: Device) -> Transport:
    """Return where the page is going to be; the phone itself comes when it likes."""
    return Phone(device)


class Phone(Transport):
    """An address that somebody opens.

    listen: this machine's address to serve on, None for loopback alone
    address: an Android device on which adb opens the page, None where a person does
    progress: is told what the phone does
    """

    def __init__(self, device: Device) -> None:
        self.machine = device.machine or "unknown"
        self.interpreter = "the phone's browser"
        self.emulated = False
        self.address = device.address
        self.listen = device.listen
        self.progress: Callable[[str], None] = lambda _: None

    def send(self, files: Mapping[str, Path]) -> str:  # noqa: ARG002 - nothing can be sent
        """Refuse: a browser fetches by itself."""
        raise _no_program()

    def run(
        self,
        arguments: Sequence[str],  # noqa: ARG002 - nothing can be run
        *,
        cwd: str,  # noqa: ARG002
        stdin: str = "",  # noqa: ARG002
        timeout_s: float | None = None,  # noqa: ARG002
    ) -> Completed:
        """Refuse: a browser runs pages alone."""
        raise _no_program()

    def close(self) -> None:
        """Do nothing: a page ends with its measurement."""


def _no_program() -> ProfileError:
    return ProfileError("a phone's browser runs pages, and this runtime is a program", hint="choose --runtime web")
