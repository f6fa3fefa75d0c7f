"""ReFT: (f(v source + bias) - v subtracted) up at the first positions of a text, or at its first and last ones.

v is what the settings say that it `reads`; f their `activation`, without which the two products on v are one. Each
column of the narrow values is for positions of its own: p of them lie before a position in its text, q behind it, and a
column counts where 0 <= p < first; with `ends` "both" also rest <= q < last must hold. Where a text lies in its row is
read off the attention mask, and how much of it came before off a decoder's. A decoder cannot tell what will come, so it
has no last positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.errors import ExportError
from edgeadapt.quantize.drawing import Place

MASK = "attention_mask"
_CACHE = "past_key_values."


def shapes(module: TargetModule, settings: Mapping[str, str | int]) -> dict[str, tuple[int | str, ...]]:
    """Return the terms' shapes."""
    features = module.out_features
    subtracted = {"subtracted": (features, "width")} if settings["activation"] != "linear" else {}
    ends = ("first", "rest", "last") if settings["ends"] == "both" else ("first",)
    return {
        "source": (features, "width"),
        "bias": ("width",),
        **subtracted,
        "up": ("width", features),
        **dict.fromkeys(ends, ("width",)),
    }


def draw(place: Place) -> ir.Value:
    """Draw the products, and between them what counts where.

    Raises:
        ExportError: a text's last positions are wanted, and the graph continues texts.
    """
    terms, v = place.terms, place.read()
    narrow = place.activated(place.add("Add", [place.add("MatMul", [v, terms["source"]]), terms["bias"]]))
    if "subtracted" in terms:
        narrow = place.add("Sub", [narrow, place.add("MatMul", [v, terms["subtracted"]])])
    counted = place.add("Where", [_counts(place, v), narrow, place.number(0.0)])
    return place.add("MatMul", [counted, terms["up"]])


def _counts(place: Place, v: ir.Value) -> ir.Value:
    """Return bool[batch, seq, width] (an image: [seq, width]): whether a column counts at a position."""
    length = place.add("Shape", [v], start=1, end=2)
    steps = place.add("Range", [place.whole(0), place.add("Squeeze", [length, place.integers(0)]), place.whole(1)])
    before, behind = _places(place, length, steps)
    terms, zero = place.terms, place.number(0.0)
    before = _column(place, before)
    found = place.add("And", [place.add("GreaterOrEqual", [before, zero]), place.add("Less", [before, terms["first"]])])
    if behind is None:
        return found
    behind = _column(place, behind)
    found = place.add("And", [found, place.add("GreaterOrEqual", [behind, terms["rest"]])])
    return place.add("And", [found, place.add("Less", [behind, terms["last"]])])


def _places(place: Place, length: ir.Value, steps: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Return how many positions of its text lie before each position, and behind it, int64[batch, seq] or int64[seq].

    None for those behind it where the settings do not ask for them.
    """
    graph = place.marker.graph
    assert graph is not None  # it is being lowered
    inputs = {str(value.name): value for value in graph.inputs}
    both, one = place.settings["ends"] == "both", place.integers(1)
    if any(name.startswith(_CACHE) for name in inputs):
        if both:
            raise ExportError(
                f"an adapter changes the last positions of a text at {place.module.path}, and in a model that writes "
                "texts a position is the last one only until the next token: what the key-value cache holds of it "
                "would have to change",
                hint="train it with suffix_positions=0",
            )
        seen = place.add("ReduceSum", [inputs[MASK], one], keepdims=1)
        past = place.add("Max", [place.add("Sub", [seen, length]), place.integers(0)])
        return place.add("Add", [past, steps]), None
    if MASK in inputs:
        real = place.add("Cast", [place.add("Equal", [inputs[MASK], one])], to=ir.DataType.FLOAT)
        start = place.add("ArgMax", [real], axis=1, keepdims=1)
        tokens = place.add("Cast", [place.add("ReduceSum", [real, one], keepdims=1)], to=ir.DataType.INT64)
    else:
        start, tokens = place.integers(0), length
    before = place.add("Sub", [steps, start])
    return before, place.add("Sub", [place.add("Sub", [tokens, one]), before]) if both else None


def _column(place: Place, counted: ir.Value) -> ir.Value:
    """Return numbers of positions as float32, with an axis to meet the columns."""
    return place.add("Unsqueeze", [place.add("Cast", [counted], to=ir.DataType.FLOAT), place.integers(-1)])
