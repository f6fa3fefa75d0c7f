"""ExecuTorch with XNNPACK: the bundle's graphs as .pte programs."""

from __future__ import annotations

from pathlib import Path

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.runtimes import _convert

ENGINE = "executorch"
INSTALL = "on the device: pip install torch==2.13.0 and then executorch"
CONVERTS = True
RUNTIME = _convert.Runtime(
    "executorch", ("executorch", "onnx"), "pip install 'edgeadapt[executorch]', or scripts/install-runtime executorch"
)


def require(device: Device) -> None:
    """Check that the provider is ExecuTorch's, and that its converter is here.

    Raises:
        ProfileError: saying what is missing.
    """
    _convert.require(RUNTIME, device)


def interpreter() -> str | None:
    """Return the Python that runs ExecuTorch on this machine, if another than this one is named."""
    return _convert.named(RUNTIME)


def prepare(bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:
    """Convert the bundle's graph in both forms."""
    return _convert.convert(RUNTIME, bundle, device, folder, shapes)
