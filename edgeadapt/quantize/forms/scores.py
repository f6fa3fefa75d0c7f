"""Task-Adapted Attention: bias, added to the scores [..., tokens, tokens] of the attention whose output a module reads.

The same for all heads and windows; the softmax comes after.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.quantize.drawing import Place


def shapes(_module: TargetModule, settings: Mapping[str, str | int]) -> dict[str, tuple[int | str, ...]]:
    """Return the term's shape."""
    return {"bias": (int(settings["tokens"]), int(settings["tokens"]))}


def draw(place: Place) -> ir.Value:
    """Return what is added; `adds` of the settings says where."""
    return place.terms["bias"]
