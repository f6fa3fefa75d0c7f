"""Core ML: the bundle's graphs as .mlpackage, their specification checked; prediction is not measurable here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.runtimes import _convert
from edgeadapt.profiling.transports import Transport

ENGINE = "coreml"
INSTALL = "pip install 'edgeadapt[coreml]', or scripts/install-runtime coreml"
RUNTIME = _convert.Runtime("coreml", ("coremltools", "torch", "onnx"), INSTALL)
require, made_for = RUNTIME.require, RUNTIME.made_for


def prepare(bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:
    """Convert the bundle's graph in both forms, open what was saved, and compare its specification.

    Raises:
        ProfileError: if the bundle is a decoder's, or the conversion failed.
    """
    if "decoder" in bundle.manifest.graphs:  # coremltools 9.0: "Unsupported fx node alias"
        raise ProfileError(
            f"{bundle.manifest.name} writes text, and Core ML's converter knows no operator 'alias', which decoders "
            "have when torch has traced them",
            hint="profile this bundle with a runtime that reads ONNX (onnxruntime), or with litert or executorch",
        )
    return RUNTIME.prepare(bundle, device, folder, shapes)


def measure(
    folder: Path,
    transport: Transport,  # noqa: ARG001 - nothing runs
    timeout_s: float | None,  # noqa: ARG001 - nothing runs
    what: str,  # noqa: ARG001 - whatever is asked for
) -> dict[str, Any]:
    """Say what was converted, and that it cannot be run here.

    Raises:
        ProfileError: always.
    """
    packages = sorted(path for path in (folder / "model").iterdir() if path.suffix == ".mlpackage")
    size = sum(file.stat().st_size for package in packages for file in package.rglob("*") if file.is_file())
    raise ProfileError(
        f"{len(packages)} Core ML packages ({size / 1e6:.1f} MB) were converted, saved and opened again, with the "
        "inputs and outputs that were asked for; prediction: not measurable here",
        hint="Core ML predicts on macOS and iOS alone: keep the packages with --models FOLDER; for figures of "
        "this machine take another --runtime",
    )
