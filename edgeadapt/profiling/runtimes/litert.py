"""LiteRT (TensorFlow Lite) with XNNPACK: the bundle's graphs as .tflite models."""

from __future__ import annotations

from pathlib import Path

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.runtimes import _convert

ENGINE = "litert"
INSTALL = "on the device: pip install ai-edge-litert numpy"
CONVERTS = True
RUNTIME = _convert.Runtime(
    "litert", ("litert_torch", "onnx"), "pip install 'edgeadapt[litert]', or scripts/install-runtime litert"
)


def require(device: Device) -> None:
    """Check that the provider is LiteRT's, and that its converter is here.

    Raises:
        ProfileError: saying what is missing.
    """
    _convert.require(RUNTIME, device)


def interpreter() -> str | None:
    """Return the Python that runs LiteRT on this machine, if another than this one is named."""
    return _convert.named(RUNTIME)


def prepare(bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:
    """Convert the bundle's graph in both forms."""
    return _convert.convert(RUNTIME, bundle, device, folder, shapes)
