"""A 64-bit Arm processor emulated by qemu on this machine: its answers can be checked, its times mean nothing.

It needs qemu-user and a folder with arm64's libraries, Python, numpy and runtime, as scripts/arm64-sysroot makes one.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.transports import Transport
from edgeadapt.profiling.transports._folder import FolderTransport
from edgeadapt.profiling.transports._python import check_machine, machine_of

VARIABLE = "EDGEADAPT_ARM64_SYSROOT"
_MAKE = f"make one with scripts/arm64-sysroot FOLDER, and give it as --address FOLDER or {VARIABLE}"

# The "CPU part" of /proc/cpuinfo, and qemu's -cpu for it: libraries choose instructions by the part, so one that does
# not fit the processor ends in an illegal instruction. "max" is left out: its SME makes int8 products wrong.
_CPUS = {"0xd03": "cortex-a53", "0xd0b": "cortex-a76"}


def connect(device: Device) -> Transport:
    """Return an emulated machine whose files are in `device.address`, or in the folder that the environment names.

    Raises:
        ProfileError: if qemu or the folder is missing, or it is not what the device's file says.
    """
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        raise ProfileError(
            "there is no qemu for arm64 programs here", hint="install it (Debian: apt install qemu-user-static)"
        )
    address = device.address or os.environ.get(VARIABLE)
    if address is None:
        raise ProfileError(f"no folder with arm64's files is named for the device {device.name!r}", hint=_MAKE)
    return Emulated(device, qemu, Path(address).absolute())


class Emulated(FolderTransport):
    """Programs of another processor in a folder of this machine; only their own files of the system are theirs."""

    def __init__(self, device: Device, qemu: str, sysroot: Path) -> None:
        self.before = (qemu, "-cpu", _cpu(sysroot), "-L", str(sysroot))
        self.interpreter = device.interpreter or _interpreter(sysroot)
        super().__init__(device.name)
        self.where = f"{device.name} (emulated)"
        self.emulated = True
        with self.closed_on_error():
            self.machine = machine_of(self.interpreter, self.where, self.probe)
            check_machine(device, self.machine, self.where)


def _cpu(sysroot: Path) -> str:
    """Return the processor that the folder's /proc/cpuinfo describes, by its name for qemu."""
    path = sysroot / "proc" / "cpuinfo"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"{sysroot} is no folder with arm64's files: it has no proc/cpuinfo", hint=_MAKE) from error
    parts = sorted(set(re.findall(r"^CPU part\s*:\s*(\S+)$", text, re.MULTILINE)))
    if len(parts) != 1 or parts[0] not in _CPUS:
        raise ProfileError(
            f"{path} describes a processor that is not emulated: CPU part {', '.join(parts) or 'not named'}",
            hint=f"known parts: {', '.join(f'{part} ({name})' for part, name in _CPUS.items())}",
        )
    return _CPUS[parts[0]]


def _interpreter(sysroot: Path) -> str:
    found = sorted((sysroot / "usr" / "bin").glob("python3.*[0-9]"))
    if not found:
        raise ProfileError(f"{sysroot} holds no Python: no usr/bin/python3.*", hint=_MAKE)
    return str(found[-1])
