"""ONNX Runtime in Node.js, as servers and desktop applications in JavaScript run it."""

from __future__ import annotations

import shutil
from pathlib import Path
from time import monotonic
from typing import Any

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import launch
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.node_packages import find_package, install_command
from edgeadapt.profiling.runtimes._javascript import write_graphs
from edgeadapt.profiling.transports import Transport, files_below
from edgeadapt.profiling.transports.local import Local

ENGINE = "onnxruntime_node"
PACKAGE = "onnxruntime-node"
INSTALL = install_command(PACKAGE, ".")
KINDS = ("memory",)

_DEVICE_SIDE = Path(__file__).parents[1] / "device_side"
_PROGRAM = ("node_main.mjs", "measure.mjs", "engine.mjs", "tensors.mjs", "system_node.mjs")
_NODE = "install Node.js 18 or newer (Debian: apt install nodejs npm)"


def require(device: Device) -> None:
    """Check that there is a Node.js with the runtime's package, as far as that is this machine's.

    Raises:
        ProfileError: saying what is missing.
    """
    if device.provider != "cpu":
        raise ProfileError(
            f"ONNX Runtime in Node.js is measured on the CPU, not on {device.provider!r}",
            hint="choose a device with provider cpu",
        )
    if device.transport != "local":
        return
    if shutil.which("node") is None:
        raise ProfileError("there is no program node here", hint=_NODE)
    find_package(PACKAGE)


def made_for(device: Device, shapes: Shapes) -> dict[str, Any]:  # noqa: ARG001 - any shape is taken
    """Return what the graphs depend on: nothing but the bundle."""
    return {}


def prepare(bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:  # noqa: ARG001 - any shape is taken
    """Write the graphs as this API opens them."""
    files, options = write_graphs(bundle, folder)
    return Models(files, {**options, "provider": device.provider, "threads": device.threads})


def measure(folder: Path, transport: Transport, timeout_s: float | None, what: str) -> dict[str, Any]:
    """Return what a process of its own measures on the device.

    On another machine the package is looked for in node_modules of the user's home folder.

    Raises:
        ProfileError: if Node.js or the package is missing there, or the measurement failed or took too long.
    """
    here = isinstance(transport, Local)
    modules = str(find_package(PACKAGE).parents[1]) if here else "~"
    program = {name: _DEVICE_SIDE / name for name in _PROGRAM}
    place = transport.send({**files_below(folder), **program})
    spawned = [repr(monotonic())] if here else []
    done = transport.run(["node", "node_main.mjs", ".", what, modules, *spawned], cwd=place, timeout_s=timeout_s)
    if done.returncode == 127:
        raise ProfileError(f"there is no program node on {transport.machine}", hint=_NODE)
    return launch.answer_of(done, what, install_command(PACKAGE, modules))
