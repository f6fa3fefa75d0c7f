"""Tip-Adapter: weight exp(sharpness (f keys^T - 1)) values; f is what a classifier reads, at length 1."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.quantize.drawing import OUTPUTS, Place

OUTPUTS_BESIDE = ("features",)
"""f itself, from which new rows are made on the device."""


def shapes(module: TargetModule, _settings: Mapping[str, str | int]) -> dict[str, tuple[int | str, ...]]:
    """Return the terms' shapes. The classes are the adapter's: a head may be replaced."""
    return {"keys": ("rows", module.in_features), "values": ("rows", OUTPUTS), "weight": (1,), "sharpness": (1,)}


def draw(place: Place) -> ir.Value:
    """Draw the affinities to all rows, and the sum of the rows' values that they weigh."""
    length = place.add("ReduceL2", [place.x, place.integers(-1)], keepdims=1)
    features = place.add("Div", [place.x, length])
    place.outputs["features"] = (features, ["examples", place.module.in_features])
    affinity = place.add("MatMul", [features, place.add("Transpose", [place.terms["keys"]], perm=[1, 0])])
    exponent = place.add("Mul", [place.add("Sub", [affinity, place.number(1.0)]), place.terms["sharpness"]])
    votes = place.add("MatMul", [place.add("Exp", [exponent]), place.terms["values"]])
    return place.add("Mul", [votes, place.terms["weight"]])
