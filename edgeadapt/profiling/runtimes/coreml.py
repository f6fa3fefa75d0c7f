"""Core ML: the bundle's graphs as .mlpackage, their specification checked; prediction is not measurable here."""

from __future__ import annotations

from pathlib import Path

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.runtimes import _convert

ENGINE = "coreml"
INSTALL = "pip install 'edgeadapt[coreml]', or scripts/install-runtime coreml"
CONVERTS = True
RUNTIME = _convert.Runtime("coreml", ("coremltools", "torch", "onnx"), INSTALL)
require = RUNTIME.require


def prepare(bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:
    """Convert the bundle's graph in both forms, open what was saved, and compare its specification.

    Raises:
        ProfileError: always: the bundle is a decoder's, the conversion failed, or it did not and this says what cannot
            be had.
    """
    if "decoder" in bundle.manifest.graphs:  # coremltools 9.0: "Unsupported fx node alias"
        raise ProfileError(
            f"{bundle.manifest.name} writes text, and Core ML's converter knows no operator 'alias', which decoders "
            "have when torch has traced them",
            hint="profile this bundle with a runtime that reads ONNX (onnxruntime), or with litert or executorch",
        )
    RUNTIME.prepare(bundle, device, folder, shapes)
    packages = sorted(path for path in (folder / "model").iterdir() if path.suffix == ".mlpackage")
    size = sum(file.stat().st_size for package in packages for file in package.rglob("*") if file.is_file())
    raise ProfileError(
        f"{len(packages)} Core ML packages ({size / 1e6:.1f} MB) were converted, saved and opened again, with the "
        "inputs and outputs that were asked for; prediction: not measurable here",
        hint="Core ML predicts on macOS and iOS alone; for figures of this machine take another --runtime",
    )
