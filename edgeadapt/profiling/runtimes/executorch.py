"""ExecuTorch with XNNPACK: the base's weights as one .ptd, which small .pte programs share, one per adapter."""

from __future__ import annotations

from edgeadapt.profiling.runtimes import _convert

ENGINE = "executorch"
INSTALL = "on the device: pip install torch==2.13.0 and then executorch"
RUNTIME = _convert.Runtime(
    "executorch",
    ("executorch", "onnx"),
    "pip install 'edgeadapt[executorch]', or scripts/install-runtime executorch",
    programs=True,
)
require, interpreter = RUNTIME.require, RUNTIME.interpreter
prepare, made_for = RUNTIME.prepare, RUNTIME.made_for
