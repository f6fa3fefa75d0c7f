"""CLIP-Adapter: relu(relu(y down) up) - share y, so that y' = (1 - share) y + relu(relu(y down) up)."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.quantize.drawing import Place


def shapes(module: TargetModule, _settings: Mapping[str, str | int]) -> dict[str, tuple[int | str, ...]]:
    """Return the terms' shapes."""
    features = module.out_features
    return {"down": (features, "width"), "up": ("width", features), "share": (1,)}


def draw(place: Place) -> ir.Value:
    """Draw the two products and their activations."""
    narrow = place.add("Relu", [place.add("MatMul", [place.y, place.terms["down"]])])
    wide = place.add("Relu", [place.add("MatMul", [narrow, place.terms["up"]])])
    return place.add("Sub", [wide, place.add("Mul", [place.y, place.terms["share"]])])
