"""This machine: programs run in a folder for temporary files, beside links to what was sent."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from edgeadapt.device import Device, require_this_machine
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.transports import Transport
from edgeadapt.profiling.transports._folder import FolderTransport
from edgeadapt.profiling.transports._python import check_machine, machine_of


def connect(device: Device) -> Transport:
    """Return this machine, with the Python that runs edgeadapt or the one that `device.interpreter` names.

    Raises:
        ProfileError: if this is not the device's kind of machine, or the interpreter cannot be used.
    """
    require_this_machine(device)
    if device.address is not None:
        raise ProfileError(
            f"device {device.name!r} is this machine and has no address, got {device.address!r}",
            hint="leave --address out, or choose a device with another transport",
        )
    return Local(device)


class Local(FolderTransport):
    """This machine and one Python of it."""

    def __init__(self, device: Device) -> None:
        super().__init__(device.name)
        self.interpreter = device.interpreter or sys.executable
        self.machine = platform.machine()
        self.emulated = False
        if device.interpreter is not None and Path(device.interpreter) != Path(sys.executable):
            with self.closed_on_error():
                self.machine = machine_of(device.interpreter, self.where, self.probe)
                check_machine(device, self.machine, self.where)
            self.emulated = self.machine != platform.machine()
