"""Tip-Adapter: exp(sharpness (f keys - 1)) values, f what a classifier reads, at length 1; a row for each example."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.quantize.drawing import OUTPUTS, Place


def shapes(module: TargetModule, _settings: Mapping[str, str | int]) -> dict[str, tuple[int | str, ...]]:
    """Return the terms' shapes. The classes are the adapter's: a head may be replaced."""
    return {"keys": (module.in_features, "rows"), "values": ("rows", OUTPUTS), "sharpness": (1,)}


def draw(place: Place) -> ir.Value:
    """Draw the affinities to all rows, and the sum of the rows' values that they weigh."""
    length = place.add("ReduceL2", [place.x, place.integers(-1)], keepdims=1)
    affinity = place.add("MatMul", [place.add("Div", [place.x, length]), place.terms["keys"]])
    exponent = place.add("Mul", [place.add("Sub", [affinity, place.number(1.0)]), place.terms["sharpness"]])
    return place.add("MatMul", [place.add("Exp", [exponent]), place.terms["values"]])
