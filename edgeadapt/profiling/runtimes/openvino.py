"""OpenVINO, Intel's runtime for CPUs (x86-64 and Arm): it reads the bundle's graphs, every input a required one."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.runtimes._required import required_graphs

ENGINE = "openvino"
INSTALL = (
    "pip install 'edgeadapt[openvino]', or scripts/install-runtime openvino; on another machine: "
    "pip install openvino numpy"
)
VARIABLE = "EDGEADAPT_OPENVINO_PYTHON"


def require(device: Device) -> None:
    """Check that the device is a CPU, and OpenVINO is there as far as that can be seen from here.

    Raises:
        ProfileError: saying what is missing.
    """
    if device.provider != "cpu":
        raise ProfileError(
            f"OpenVINO is measured on the CPU, not on {device.provider!r}", hint="choose a device with provider cpu"
        )
    if device.transport == "local" and device.interpreter is None and find_spec("openvino") is None:
        raise ProfileError(
            "openvino is not installed",
            hint=f"{INSTALL}; or let --interpreter or {VARIABLE} name a Python that has it",
        )


def interpreter() -> str | None:
    """Return the Python that runs it on this machine, if its variable names one."""
    return os.environ.get(VARIABLE)


def made_for(device: Device, shapes: Shapes) -> dict[str, Any]:  # noqa: ARG001 - any shape is taken
    """Return what the graphs depend on: nothing but the bundle."""
    return {}


def prepare(bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:  # noqa: ARG001 - any shape is taken
    """Write the graphs so that OpenVINO keeps adapters' inputs: a default would become a constant there."""
    files, defaults = required_graphs(bundle, folder)
    return Models(files, {"provider": device.provider, "threads": device.threads}, defaults=defaults)
