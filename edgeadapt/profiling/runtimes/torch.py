"""torch, operator by operator in float32, on an NVIDIA GPU or the CPU: the bundle's graphs as torch modules."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.runtimes import _convert
from edgeadapt.profiling.runtimes.onnxruntime import graphs_of
from edgeadapt.runtime import ort

ENGINE = "torch_eager"
INSTALL = (
    "pip install torch onnx numpy (for a GPU, torch's build for its CUDA: https://pytorch.org/get-started/locally)"
)
BESIDE = ("convert",)
_MODULES = ("torch", "onnx")
_PROVIDERS = ("cpu", "cuda")
_NOTES = (
    "torch runs the graph operator by operator, in float32 without TF32",
    "weights in codes are made float32 as the models open, which is part of the load time",
    "models have fixed shapes; adapters are inputs, padded to the largest rank among this bundle's",
)


def require(device: Device) -> None:
    """Check that the provider is torch's, and, for this machine, that torch is here, and a GPU where one is needed.

    Raises:
        ProfileError: saying what is missing.
    """
    if device.provider not in _PROVIDERS:
        raise ProfileError(f"torch does not run on {device.provider!r}", hint=f"known: {', '.join(_PROVIDERS)}")
    if device.transport != "local":
        return
    if device.provider == "cuda" and not ort.gpu_is_visible():
        raise ProfileError(
            "torch on 'cuda' needs an NVIDIA GPU, and none can be seen (no /dev/nvidia*, no nvidia-smi)",
            hint="choose --device cpu, or a machine with a GPU and its driver",
        )
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing and device.interpreter is None:
        raise ProfileError(
            f"{missing[0]} is not installed", hint=f"{INSTALL}; or name a Python that has it with --interpreter"
        )


def prepare(bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:
    """Put the bundle's graphs and their weights into the job, and say with which shapes they are run.

    Raises:
        ProfileError: if the bundle is of a kind that this runtime does not run.
    """
    signatures = _convert.signatures(bundle, shapes)
    files = graphs_of(bundle, folder)
    options = {"provider": device.provider, "threads": device.threads, "signatures": signatures}
    return Models({form: files[form] for form in signatures}, options, notes=_NOTES)
