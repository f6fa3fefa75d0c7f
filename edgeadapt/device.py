"""What a profile runs on: one TOML file in devices/."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeadapt import settings
from edgeadapt.errors import ProfileError, RecipeError
from edgeadapt.fields import from_mapping


@dataclass(frozen=True)
class Device:
    """A machine, as far as a profile needs to know it.

    name: the file's name without ".toml"; title: one line for people
    provider: the part of ONNX Runtime that does the work
    threads: intra-op threads, None for as many as the machine has cores
    machine: what `uname -m` says on it, None for any machine
    memory_bytes: how much memory it has, None where that varies
    sources: where these facts come from
    """

    name: str
    title: str
    provider: Literal["cpu", "cuda"]
    threads: int | None = None
    machine: str | None = None
    memory_bytes: int | None = None
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers that no machine has."""
        for field in ("threads", "memory_bytes"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"field {field} must be at least 1, got {value}")


def read_device(name: str | Path) -> Device:
    """Return a device by its name in devices/, or by the path of a .toml file.

    Raises:
        RecipeError: if there is no such device, or its file holds an unknown, missing or wrong field.
    """
    path = settings.find("devices", name)
    data = settings.read(path)
    if "name" in data:
        raise RecipeError(f"{path}: unknown field name", hint="a device's name is its file's name")
    return from_mapping(Device, {**data, "name": path.stem}, str(path), RecipeError)


def require_this_machine(device: Device, machine: str | None = None) -> None:
    """Check that `device` may be what this process runs on; `machine` is what `uname -m` says here, if not asked.

    Raises:
        ProfileError: if the device is of another architecture than this machine.
    """
    here = platform.machine() if machine is None else machine
    if device.machine is not None and device.machine != here:
        raise ProfileError(
            f"device {device.name!r} is an {device.machine} machine, and this one is {here}",
            hint=f"run `edgeadapt profile` on the {device.name} itself, or use --device cpu for this machine",
        )
