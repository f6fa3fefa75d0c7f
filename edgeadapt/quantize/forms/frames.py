"""ST-Adapter: (mix * (v down + down_bias) + mix_bias) up + up_bias on the tokens of pictures that are frames of a clip.

mix * is a depth-wise convolution over a clip's frames, token by token, zeros before its first and behind its last. The
first `skipped` tokens (a class token) stay as they are. v is [clips x frames, tokens, features].
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.quantize.drawing import Place

_END = 2**62


def shapes(module: TargetModule, settings: Mapping[str, str | int]) -> dict[str, tuple[int | str, ...]]:
    """Return the terms' shapes."""
    features = module.out_features
    return {
        "down": (features, "width"),
        "down_bias": ("width",),
        "mix": (int(settings["kernel"]), "width"),
        "mix_bias": ("width",),
        "up": ("width", features),
        "up_bias": (features,),
    }


def draw(place: Place) -> ir.Value:
    """Draw the two products and what is between them."""
    terms, skipped = place.terms, int(place.settings["skipped"])
    v = place.read()
    if skipped:
        v = place.add("Slice", [v, place.integers(skipped), place.integers(_END), place.integers(1)])
    narrow = place.add("Add", [place.add("MatMul", [v, terms["down"]]), terms["down_bias"]])
    mixed = place.add("Add", [_mixed(place, narrow), terms["mix_bias"]])
    wide = place.add("Add", [place.add("MatMul", [mixed, terms["up"]]), terms["up_bias"]])
    return place.add("Pad", [wide, place.integers(0, skipped, 0, 0, 0, 0)]) if skipped else wide


def _mixed(place: Place, narrow: ir.Value) -> ir.Value:
    """Return the convolution of [clips x frames, tokens, width] over the frames, as a sum of what is moved by frames.

    The number of clips is worked out, for a shape of -1 has no meaning where the width is 0.
    """
    frames, kernel = int(place.settings["frames"]), int(place.settings["kernel"])
    clips = place.add("Div", [place.add("Shape", [narrow], start=0, end=1), place.integers(frames)])
    rest = place.add("Shape", [narrow], start=1)
    shape = place.add("Concat", [clips, place.integers(frames), rest], axis=0)
    apart = place.add("Reshape", [narrow, shape], allowzero=1)
    edge = kernel // 2
    padded = place.add("Pad", [apart, place.integers(0, edge, 0, 0, 0, edge, 0, 0)])
    total: ir.Value | None = None
    for offset in range(kernel):
        moved = place.add("Slice", [padded, place.integers(offset), place.integers(offset + frames), place.integers(1)])
        weighted = place.add("Mul", [moved, place.add("Gather", [place.terms["mix"], place.integers(offset)], axis=0)])
        total = weighted if total is None else place.add("Add", [total, weighted])
    return place.add("Reshape", [total, place.add("Shape", [narrow])], allowzero=1)
