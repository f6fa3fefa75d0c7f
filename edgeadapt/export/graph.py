"""A base as ONNX models whose adapter sites are still markers.

A marker is a node of domain `edgeadapt` that passes a tensor through and remembers where it comes from:

- `AdapterSite(x, y) -> y`, attribute `site` (module path): a module with input x and output y; or `sites`: modules
  that all read x, their outputs one after the other in y;
- `ParameterSite(p) -> p`, attribute `parameter` (parameter name): a parameter that an adapter replaces whole.

Markers survive fusion and quantization; `quantize.pack` lowers them last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from edgeadapt.decoder_spec import DecoderSpec

MARKER_DOMAIN = "edgeadapt"
ADAPTER_SITE = "AdapterSite"
PARAMETER_SITE = "ParameterSite"


@dataclass(frozen=True)
class Graph:
    """ONNX models by role with markers in place.

    models: "model" for a single pass, "decoder" for a decoder, "encoder" and "decoder" for a sequence-to-sequence
        model, "image" and "text" for a model of two towers
    """

    models: Mapping[str, ir.Model]
    task: str
    generation: DecoderSpec | None = None
