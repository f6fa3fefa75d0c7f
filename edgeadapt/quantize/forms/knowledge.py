"""K-Adapter: y H + a A + bias, or a: y the last hidden state, a the last of adapters on several modules' outputs.

a_i = v + encoder(v down + down_bias) up + up_bias, v = h_i + a_(i-1), h_i the output of the i-th of `places`; encoder:
`layers` of BERT's, whose attention sees all tokens. The first axis of H, A and bias (of `present`) has one entry, or
none: then no row of a batch enters the adapters, and what is added is zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.quantize.drawing import Place

WHOLE_TEXT = True
"""It mixes all tokens of a text, so it has no place in a decoder, which sees a text piece by piece."""
SHORTEST = {"width": 1}
"""Lengths of axes where there is no adapter: a norm over no number at all is refused, even where there are no rows."""


def shapes(module: TargetModule, settings: Mapping[str, str | int]) -> dict[str, tuple[int | str, ...]]:
    """Return the terms' shapes."""
    features = module.out_features
    join: dict[str, tuple[int | str, ...]] = {
        "present": ("present",),
        "h": ("present", 1, features, features),
        "a": ("present", 1, features, features),
    }
    found = {term: join[term] for term in str(settings["join"]).split("+")}
    if "h" in found:
        found["bias"] = ("present", 1, 1, features)
    for place in range(len(str(settings["places"]).split(","))):
        width = f"{place}.width"
        found |= {f"{place}.down": (features, width), f"{place}.down_bias": (width,)}
        found |= {f"{place}.up": (width, features), f"{place}.up_bias": (features,)}
        for layer in range(int(settings["layers"])):
            terms = _layer_shapes(width, f"{place}.{layer}.inner")
            found |= {f"{place}.{layer}.{term}": shape for term, shape in terms.items()}
    return found


def _layer_shapes(width: str, inner: str) -> dict[str, tuple[int | str, ...]]:
    return {
        "qkv": (3, width, width),
        "qkv_bias": (3, 1, width),
        "out": (width, width),
        "out_bias": (width,),
        "norm": (width,),
        "norm_bias": (width,),
        "wide": (width, inner),
        "wide_bias": (inner,),
        "narrow": (inner, width),
        "narrow_bias": (width,),
        "norm2": (width,),
        "norm2_bias": (width,),
    }


def draw(place: Place) -> ir.Value:
    """Draw all adapters and what joins them with the last hidden state."""
    present = place.add("Shape", [place.terms[str(place.settings["join"]).partition("+")[0]]], start=0, end=1)
    rows = place.add("Mul", [present, place.add("Shape", [place.y], start=0, end=1)])
    a: ir.Value | None = None
    for index, path in enumerate(str(place.settings["places"]).split(",")):
        v = place.add("Slice", [place.behind(path), place.integers(0), rows, place.integers(0)])
        v = v if a is None else place.add("Add", [v, a])
        narrow = _linear(place, v, f"{index}.down")
        for layer in range(int(place.settings["layers"])):
            narrow = _layer(place, narrow, f"{index}.{layer}")
        a = place.add("Add", [v, _linear(place, narrow, f"{index}.up")])
    shape = place.add("Concat", [present, place.add("Shape", [place.y])], axis=0)
    result = place.add("Reshape", [a, shape], allowzero=1)  # [present, rows, tokens, features]
    if "a" in place.terms:
        result = place.add("MatMul", [result, place.terms["a"]])
    if "h" in place.terms:
        y = place.add("Unsqueeze", [place.y, place.integers(0)])
        result = place.add("Add", [result, place.add("MatMul", [y, place.terms["h"]])])
        result = place.add("Add", [result, place.terms["bias"]])
    return place.add("ReduceSum", [result, place.integers(0)], keepdims=0)


def _layer(place: Place, x: ir.Value, prefix: str) -> ir.Value:
    """Draw one of BERT's layers on [rows, tokens, width]."""
    x = _normed(place, x, _linear(place, _attended(place, x, prefix), f"{prefix}.out"), f"{prefix}.norm")
    wide = place.activated(_linear(place, x, f"{prefix}.wide"))
    return _normed(place, x, _linear(place, wide, f"{prefix}.narrow"), f"{prefix}.norm2")


def _attended(place: Place, x: ir.Value, prefix: str) -> ir.Value:
    """Draw the attention of all tokens to all: [rows, tokens, width] to the same.

    No size is left open in a shape, for it would have no meaning where there are no rows.
    """
    heads = place.integers(int(place.settings["heads"]))
    size = place.add("Shape", [x])
    outer, width = (place.add("Shape", [x], start=start, end=end) for start, end in ((0, 2), (2, 3)))
    apart = place.add("Concat", [outer, heads, place.add("Div", [width, heads])], axis=0)
    spread = place.add("MatMul", [place.add("Unsqueeze", [x, place.integers(1)]), place.terms[f"{prefix}.qkv"]])
    spread = place.add("Add", [spread, place.terms[f"{prefix}.qkv_bias"]])  # [rows, 3, tokens, width]
    query, key, value = (
        place.add("Transpose", [_one_of(place, spread, index, apart)], perm=perm)
        for index, perm in enumerate(([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
    )
    scores = place.add("MatMul", [query, key])
    mixed = place.add("MatMul", [place.add("Softmax", [scores], axis=-1), value])
    return place.add("Reshape", [place.add("Transpose", [mixed], perm=[0, 2, 1, 3]), size], allowzero=1)


def _one_of(place: Place, spread: ir.Value, index: int, shape: ir.Value) -> ir.Value:
    """Draw one of query, key and value as [rows, tokens, heads, width of one]."""
    one = place.add("Gather", [spread, place.add("Constant", [], value_int=index)], axis=1)
    return place.add("Reshape", [one, shape], allowzero=1)


def _linear(place: Place, x: ir.Value, term: str) -> ir.Value:
    return place.add("Add", [place.add("MatMul", [x, place.terms[term]]), place.terms[f"{term}_bias"]])


def _normed(place: Place, x: ir.Value, change: ir.Value, term: str) -> ir.Value:
    total = place.add("Add", [x, change])
    return place.add(
        "LayerNormalization",
        [total, place.terms[term], place.terms[f"{term}_bias"]],
        axis=-1,
        epsilon=float(place.settings["eps"]),
    )
