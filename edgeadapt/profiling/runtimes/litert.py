"""LiteRT (TensorFlow Lite) with XNNPACK: the bundle's graphs as .tflite models, adapters as inputs."""

from __future__ import annotations

from edgeadapt.profiling.runtimes import _convert

ENGINE = "litert"
INSTALL = "on the device: pip install ai-edge-litert numpy"
RUNTIME = _convert.Runtime(
    "litert", ("litert_torch", "onnx"), "pip install 'edgeadapt[litert]', or scripts/install-runtime litert"
)
require, interpreter = RUNTIME.require, RUNTIME.interpreter
prepare, made_for = RUNTIME.prepare, RUNTIME.made_for
