"""What a profile runs on: one TOML file in devices/."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeadapt import settings
from edgeadapt.errors import ProfileError, RecipeError
from edgeadapt.fields import from_mapping


@dataclass(frozen=True)
class Device:
    """A machine, as far as a profile needs to know it. What is not known, or varies, is None.

    name: the file's name without ".toml"; title: one line for people; sources: where these facts come from
    runtime: what opens the models, one of edgeadapt/profiling/runtimes; provider: the part of it that does the work
    transport: how the device is reached, one of edgeadapt/profiling/transports; address: where, as that transport
        writes it; interpreter: the Python there
    listen: this machine's address at which a phone's browser finds the page, None for this machine alone
    threads: intra-op threads, None for as many as the machine has cores
    machine: what `uname -m` says on it, None for any machine; operating_system: its name and version
    cores: logical cores, of all kinds; cpu_features: instruction sets, as Linux names them
    clock_hz: the highest clock of its fastest cores
    memory_bytes: how much memory it has; memory_bandwidth_bytes_per_s: how fast all its cores together read it
    peak_flops_float32, peak_ops_int8: multiplications and additions a second that all its cores together reach
    operator_overhead_s: what an operator costs beside its memory and arithmetic; only measuring tells it
    measured: its rates were measured (`edgeadapt devices detect`); else they are what its makers say it could reach
    thermal: what limits it under load
    """

    name: str
    title: str
    provider: Literal["cpu", "cuda", "tensorrt", "wasm", "webgpu"]
    runtime: str = "session"
    transport: str = "local"
    address: str | None = None
    listen: str | None = None
    interpreter: str | None = None
    threads: int | None = None
    machine: str | None = None
    operating_system: str | None = None
    cores: int | None = None
    cpu_features: tuple[str, ...] = ()
    clock_hz: float | None = None
    memory_bytes: int | None = None
    memory_bandwidth_bytes_per_s: float | None = None
    peak_flops_float32: float | None = None
    peak_ops_int8: float | None = None
    operator_overhead_s: float | None = None
    measured: bool = False
    thermal: str | None = None
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers that no machine has."""
        for field in ("threads", "cores", "memory_bytes", *_RATES):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"field {field} must be at least 1, got {value}")
        if self.operator_overhead_s is not None and not 0 < self.operator_overhead_s < 1:
            raise ValueError(f"field operator_overhead_s must be above 0 and below 1, got {self.operator_overhead_s}")


_RATES = ("clock_hz", "memory_bandwidth_bytes_per_s", "peak_flops_float32", "peak_ops_int8")


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


def device_toml(device: Device) -> str:
    """Return the text of a device's file; `read_device` gives the same device again."""
    values = {
        field.name: value
        for field in dataclasses.fields(Device)
        if field.name != "name" and (value := getattr(device, field.name)) != field.default
    }
    return settings.to_toml(values, device.title)


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
