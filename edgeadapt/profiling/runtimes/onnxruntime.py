"""ONNX Runtime alone, with the bundle's graphs and adapters as plain inputs: nothing of edgeadapt on the device."""

from __future__ import annotations

from pathlib import Path

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError, SessionError
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.transports._folder import link_or_copy
from edgeadapt.runtime import ort

ENGINE = "onnxruntime"
INSTALL = "on the device: pip install onnxruntime numpy"
_PROVIDERS = ("cpu", "cuda", "tensorrt")


def require(device: Device) -> None:
    """Check that the provider is ONNX Runtime's, and, for this machine, that it is there.

    Raises:
        ProfileError: saying what is missing.
    """
    if device.provider not in _PROVIDERS:
        raise ProfileError(
            f"ONNX Runtime in Python does not run on {device.provider!r}", hint=f"known: {', '.join(_PROVIDERS)}"
        )
    if device.transport == "local" and device.interpreter is None:
        try:
            if device.provider != "cpu":
                ort.check_gpu(device.provider)
        except SessionError as error:
            raise ProfileError(error.message, hint=error.hint) from error


def prepare(bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:  # noqa: ARG001 - the contract's
    """Put the bundle's graphs and their weights into the job."""
    return Models(graphs_of(bundle, folder), {"provider": device.provider, "threads": device.threads})


def graphs_of(bundle: Bundle, folder: Path) -> dict[str, str]:
    """Put a bundle's only graph, in both forms, and its weights below `folder/model`; return the forms' paths.

    Raises:
        ProfileError: if the bundle has several graphs.
    """
    if len(bundle.manifest.graphs) != 1:
        raise ProfileError(
            f"{bundle.manifest.name} has the graphs {', '.join(sorted(bundle.manifest.graphs))}; this runtime measures "
            "bundles of one graph",
            hint="measure it with --runtime session",
        )
    (record,) = bundle.manifest.graphs.values()
    (folder / "model").mkdir(exist_ok=True)
    names = {"plain": record.plain, **({"slots": record.slots} if record.slots is not None else {})}
    weights = [name for name, file in bundle.manifest.files.items() if file.role == "weights"]
    for name in (*names.values(), *weights):
        link_or_copy(bundle.file(name), folder / "model" / Path(name).name)
    return {form: f"model/{Path(name).name}" for form, name in names.items()}
