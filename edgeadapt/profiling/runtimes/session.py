"""edgeadapt's Session over ONNX Runtime: every kind of bundle and adapter, as an app in Python runs it."""

from __future__ import annotations

from pathlib import Path

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError, SessionError
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.runtime import ort

ENGINE = "session"
INSTALL = "pip install edgeadapt"
OPERATORS = "onnxruntime"


def require(device: Device) -> None:
    """Check that the device is this machine, and its provider can be used.

    Raises:
        ProfileError: saying what is missing.
    """
    if device.transport != "local":
        raise ProfileError(
            f"edgeadapt's own session is measured on this machine only, and {device.name!r} is reached by "
            f"{device.transport}",
            hint="choose --runtime onnxruntime, which needs nothing of edgeadapt on the device",
        )
    if device.provider not in ("cpu", "cuda"):
        raise ProfileError(
            f"edgeadapt's own session does not run on {device.provider!r}", hint="choose another --runtime"
        )
    try:
        ort.check_provider(device.provider)
    except SessionError as error:
        raise ProfileError(error.message, hint=error.hint) from error


def prepare(bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:  # noqa: ARG001 - the contract's
    """Return where the bundle is: the session opens it there."""
    path = bundle.path.absolute()
    files = [str(path / name) for name, record in bundle.manifest.files.items() if record.role in ("graph", "weights")]
    options = {
        "source": str(Path(__file__).parents[3]),
        "bundle": str(path),
        "files": files,
        "provider": device.provider,
        "threads": device.threads,
    }
    return Models({}, options)
