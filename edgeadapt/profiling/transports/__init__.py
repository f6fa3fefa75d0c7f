"""How files and commands reach the device that a profile is for, one file each.

A transport's file has `connect(device)`, which returns a `Transport` or raises a `ProfileError` that names the next
step. The rest of the profiler knows these two names only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edgeadapt import registry
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError

TRANSPORTS = "edgeadapt.profiling.transports"


@dataclass(frozen=True)
class Completed:
    """How a program on the device ended: its exit status (-n: ended by signal n) and all that it wrote."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Invitation:
    """What a person needs to open the page.

    url: its address; qr_code: the same as a QR code of block characters, for a terminal, light on dark
    remark: who can open it
    """

    url: str
    qr_code: str
    remark: str


class Transport(ABC):
    """A connection to one device; leaving its `with` block removes what was sent, whatever happened before.

    machine: what `uname -m` says to `interpreter`
    interpreter: the Python there that runs the measuring programs; it has numpy
    emulated: the programs run on an emulated processor: answers can be checked, times mean nothing
    announce: is told where a person has to go; only a device that somebody must do something on needs it
    """

    announce: Callable[[Invitation], None] | None = None

    machine: str
    interpreter: str
    emulated: bool

    @abstractmethod
    def send(self, files: Mapping[str, Path]) -> str:
        """Copy files of this machine, by their name there ("model/decoder.onnx"), into a fresh folder of the device.

        Returns:
            The folder's path on the device; it is removed by `close`.

        Raises:
            ProfileError: if a name leads out of the folder, a file is missing, the device's disk is full, or the
                device is lost.
        """

    @abstractmethod
    def run(self, arguments: Sequence[str], *, cwd: str, stdin: str = "", timeout_s: float | None = None) -> Completed:
        """Run a program on the device, in a folder that `send` returned, and wait for its end.

        A program that cannot be started ends with 127 (not found) or 126, as in a shell. One that takes longer than
        `timeout_s` seconds is killed there, with all that it started, as it is after any exception here. Its TMPDIR is
        a folder that goes with `close`, too.

        Raises:
            ProfileError: if it took longer, or the device is lost.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop what still runs on the device and remove what was sent. A second call does nothing.

        Raises:
            ProfileError: if files may be left on the device, unless its loss was told before.
        """

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Close this transport if the block fails: for the part of a constructor that has something to undo."""
        try:
            yield
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except ProfileError as left:
            if error is None:
                raise
            error.add_note(left.message)  # the first failure is the one to tell


def connect(device: Device) -> Transport:
    """Return a connection to `device` by its transport.

    Raises:
        ProfileError: if there is no such transport, or the device cannot be used; with the next step.
    """
    found: Transport = registry.load(TRANSPORTS, device.transport, ProfileError).connect(device)
    return found


def files_below(folder: Path) -> dict[str, Path]:
    """Return what `Transport.send` takes: every file below a folder, by its name relative to it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
