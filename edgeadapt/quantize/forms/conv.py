"""Conv-Adapter: up * act(down * v), * a convolution with bias, v the input or the output of the base's convolution.

down is k x k with `groups`, `stride`, `padding` (the same on all sides) and `dilation`; up is 1 x 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.quantize.drawing import Place


def shapes(module: TargetModule, settings: Mapping[str, str | int]) -> dict[str, tuple[int | str, ...]]:
    """Return the terms' shapes. The width is the graph's: a convolution's number of groups cannot vary."""
    width, kernel = int(settings["width"]), int(settings["kernel"])
    channels = module.in_features if settings["reads"] == "input" else module.weight_shape[0]
    return {
        "down": (width, channels // int(settings["groups"]), kernel, kernel),
        "down_bias": (width,),
        "up": (module.weight_shape[0], width, 1, 1),
        "up_bias": (module.weight_shape[0],),
    }


def draw(place: Place) -> ir.Value:
    """Draw the two convolutions and the activation between them."""
    down, down_bias, up, up_bias = (place.terms[term] for term in ("down", "down_bias", "up", "up_bias"))
    settings = {name: value for name, value in place.settings.items() if isinstance(value, int)}
    narrow = place.add(
        "Conv",
        [place.x if place.settings["reads"] == "input" else place.y, down, down_bias],
        group=settings["groups"],
        strides=[settings["stride"]] * 2,
        pads=[settings["padding"]] * 4,
        dilations=[settings["dilation"]] * 2,
    )
    return place.add("Conv", [place.activated(narrow), up, up_bias])
