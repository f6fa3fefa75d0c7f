"""The form of ReFT in a graph: which columns count at which positions, as the mask and the cache have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.errors import ExportError
from edgeadapt.export.graph import Graph
from edgeadapt.quantize.lower import lower
from edgeadapt.slots import BranchKind, branch_kind

FEATURES, LENGTH = 8, 6
RANDOM = np.random.default_rng(3)
X = RANDOM.standard_normal((2, LENGTH, FEATURES)).astype(np.float32)
FAR = np.float32(2.0**31)
COLUMNS = {
    "source": RANDOM.standard_normal((FEATURES, 2)).astype(np.float32),
    "bias": RANDOM.standard_normal(2).astype(np.float32),
    "up": RANDOM.standard_normal((2, FEATURES)).astype(np.float32),
}


def made(builder: Any, kind: BranchKind, *inputs: str) -> Graph:
    """Return a lowered graph of one module, whose further inputs are a mask and a cache that nothing else reads."""
    x = builder.input("x", ["batch", "seq", FEATURES])
    for name in inputs:
        dtype = ir.DataType.INT64 if name == "attention_mask" else ir.DataType.FLOAT
        builder.input(name, ["batch", "total"], dtype)
    builder.output("y", builder.site("m", x, builder.node("Identity", [x])))
    graph = builder.done()
    module = TargetModule("m", "norm", "LayerNorm", (FEATURES,), FEATURES, FEATURES, True, "")
    lower(graph.models["model"], {}, set(), set(), {"m": module}, branches={"m": frozenset({kind})})
    graph.models["model"].opset_imports["edgeadapt"] = 1  # `run` takes it away
    return graph


def kind_of(ends: str) -> BranchKind:
    return branch_kind("positions", {"reads": "output", "activation": "linear", "ends": ends})


def change(
    first: list[float], rest: list[float], last: list[float], places: list[tuple[int, int] | None]
) -> np.ndarray:
    """Return what is added to a row; places: how many positions of its text are before and behind each, if any."""
    row = []
    for place in places:
        p, q = place or (-1, -1)
        counts = [0 <= p < a and b <= q < c for a, b, c in zip(first, rest, last, strict=True)]
        row.append(counts)
    return np.array(row, np.float32)


@pytest.mark.parametrize(
    ("mask", "places"),
    [
        ([1] * 6, [(p, 5 - p) for p in range(6)]),
        ([1] * 4 + [0] * 2, [*((p, 3 - p) for p in range(4)), None, None]),
        ([0] * 3 + [1] * 3, [None] * 3 + [(p, 2 - p) for p in range(3)]),
        ([1] + [0] * 5, [(0, 0), *[None] * 5]),
    ],
)
def test_a_text_lies_where_the_mask_has_it(mask: list[int], places: Any, builder: Any, run: Any) -> None:
    """First column: the first two but for the last one; second: the last one. Beside a row without padding."""
    graph = made(builder, kind_of("both"), "attention_mask")
    reach = {"first": [2, FAR], "rest": [1, 0], "last": [FAR, 1]}
    prefix = kind_of("both").prefix("m")
    terms = {f"{prefix}.{name}": np.asarray(value, np.float32) for name, value in {**COLUMNS, **reach}.items()}
    found = run(graph, {"x": X, "attention_mask": np.array([mask, [1] * 6]), **terms})["y"]
    narrow = X @ COLUMNS["source"] + COLUMNS["bias"]
    for row, where in ((0, places), (1, [(p, 5 - p) for p in range(6)])):
        counted = narrow[row] * change(*reach.values(), where)
        np.testing.assert_allclose(found[row], X[row] + counted @ COLUMNS["up"], atol=1e-5)
    np.testing.assert_array_equal(run(graph, {"x": X, "attention_mask": np.array([mask] * 2)})["y"], X)


def test_all_positions_of_a_picture_are_its_text(builder: Any, run: Any) -> None:
    prefix = kind_of("first").prefix("m")
    terms = {f"{prefix}.{name}": value for name, value in {**COLUMNS, "first": np.float32([1, 4])}.items()}
    found = run(made(builder, kind_of("first")), {"x": X, **terms})["y"]
    counts = np.arange(LENGTH)[:, None] < np.array([1, 4])
    narrow = (X @ COLUMNS["source"] + COLUMNS["bias"]) * counts
    np.testing.assert_allclose(found, X + narrow @ COLUMNS["up"], atol=1e-5)


@pytest.mark.parametrize("seen", [(6, 6), (8, 7), (12, 4)])
def test_a_step_goes_on_where_the_cache_ends(seen: tuple[int, int], builder: Any, run: Any) -> None:
    """A row that is shorter than its step begins at 0: its padding is at its end."""
    graph = made(builder, kind_of("first"), "attention_mask", "past_key_values.0.key")
    mask = np.array([[1] * n + [0] * (12 - n) for n in seen])
    prefix = kind_of("first").prefix("m")
    terms = {f"{prefix}.{name}": value for name, value in {**COLUMNS, "first": np.float32([3, 8])}.items()}
    feeds = {"x": X, "attention_mask": mask, "past_key_values.0.key": np.zeros((2, 12), np.float32), **terms}
    found = run(graph, feeds)["y"]
    before = np.array([max(n - LENGTH, 0) for n in seen])[:, None] + np.arange(LENGTH)
    narrow = (X @ COLUMNS["source"] + COLUMNS["bias"]) * (before[..., None] < np.array([3, 8]))
    np.testing.assert_allclose(found, X + narrow @ COLUMNS["up"], atol=1e-5)


def test_a_text_that_goes_on_has_no_last_positions(builder: Any) -> None:
    with pytest.raises(ExportError) as caught:
        made(builder, kind_of("both"), "attention_mask", "past_key_values.0.key")
    assert str(caught.value) == (
        "an adapter changes the last positions of a text at m, and in a model that writes texts a position is the last "
        "one only until the next token: what the key-value cache holds of it would have to change\n"
        "Hint: train it with suffix_positions=0"
    )
