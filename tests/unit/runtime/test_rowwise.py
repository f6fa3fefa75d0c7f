from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from edgeadapt.errors import SessionError
from edgeadapt.runtime import open_session
from edgeadapt.runtime.groups import run_groups
from edgeadapt.runtime.rowwise import RowAdapters, obstacle
from edgeadapt.slots import BottleneckSlot, Joined, ParameterSlot, Slot

SLOTS = (
    Slot(
        "l", ("decoder",), "linear", 5, 4, {"a": "l.A", "b": "l.B", "gain": "l.g", "offset": "l.o", "input_gain": "l.i"}
    ),
    Slot("e", ("decoder",), "embedding", 9, 4, {"a": "e.A", "b": "e.B"}),
    Slot("k", ("decoder",), "conv2d", 3, 4, {"a": "k.A", "b": "k.B"}),
)
MANIFEST = SimpleNamespace(
    slots=SLOTS,
    joined=(Joined("decoder", ("p", "q"), {"a": "p+q.A", "b": "p+q.B", "gain": "p+q.g"}),),
    parameters=(ParameterSlot("head.weight", ("decoder",), "head.weight", (3, 4)),),
    bottlenecks=(BottleneckSlot("f", ("decoder",), "output", "relu", False, 4, {"down": "f.down", "up": "f.up"}),),
    branches=(),
)


def _adapter(seed, rank, names="ABgoi"):
    rng = np.random.default_rng(seed)
    values = {"A": rng.normal(size=(5, rank)), "B": rng.normal(size=(rank, 4))}
    values |= {"g": rng.normal(size=4), "o": rng.normal(size=4), "i": rng.normal(size=5)}
    return {f"l.{name}": values[name].astype(np.float32) for name in names}


WEIGHT = np.random.default_rng(9).normal(size=(5, 4))


def _slot(x, y, adapter):
    """y' = ((x * input_gain) W + y + (x A) B) * gain + offset for x float[..., seq, 5], y float[..., seq, 4]."""
    low_rank = (x @ adapter["l.A"]) @ adapter["l.B"] if "l.A" in adapter else 0
    y = (x * adapter.get("l.i", 1)) @ WEIGHT + y
    return (y + low_rank) * adapter.get("l.g", 1) + adapter.get("l.o", 0)


def test_any_order_of_adapters_on_rows_gives_each_row_its_own():
    """Ranks grow and shrink, terms come and go, rows are written over: what was there before leaves no trace."""
    adapters = {
        "low": _adapter(1, 2, "AB"),
        "high": _adapter(2, 6),
        "gain": _adapter(3, 1, "g"),
        "base": {},
        "offset": _adapter(4, 3, "ABo"),
        "input_gain": _adapter(5, 1, "i"),
    }
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 7, 5)), rng.normal(size=(3, 7, 4))
    stack = RowAdapters(3, MANIFEST)
    rows = ["base"] * 3
    for row in range(3):
        stack.put(row, (("base", 1.0),), {})
    for name, row in itertools.product([*adapters, *reversed(adapters)], range(3)):
        if rng.random() < 0.6:
            continue
        rows[row] = name
        stack.put(row, ((name, 1.0),), adapters[name])
        for count in (1, 2, 3):
            bound = {key: tensor.numpy() for key, tensor in stack.part(0, count).items()}
            found = _slot(x[:count], y[:count], bound)
            expected = [_slot(x[i], y[i], adapters[rows[i]]) for i in range(count)]
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_row_is_written_in_place():
    stack = RowAdapters(2, MANIFEST)
    stack.put(0, (("a", 1.0),), _adapter(1, 4))
    views = stack.part(0, 2)
    stack.put(1, (("b", 1.0),), _adapter(2, 3))
    assert stack.part(0, 2) is views
    stack.put(1, (("c", 1.0),), _adapter(2, 5))
    assert stack.part(0, 2) is not views


def test_room_for_several_is_made_at_once():
    stack = RowAdapters(3, MANIFEST)
    adapters = [_adapter(seed, rank) for seed, rank in ((1, 4), (2, 6), (3, 5))]
    stack.reserve(adapters)
    views = stack.part(0, 3)
    for row, adapter in enumerate(adapters):
        stack.put(row, ((str(row), 1.0),), adapter)
    assert stack.part(0, 3) is views
    assert {name: view.shape for name, view in views.items()} == {
        "l.A": (3, 5, 6),
        "l.B": (3, 6, 4),
        "l.g": (3, 1, 4),
        "l.i": (3, 1, 5),
        "l.o": (3, 1, 4),
    }


def test_rows_from_any_place_on():
    stack = RowAdapters(3, MANIFEST)
    adapters = [_adapter(row, row + 1) for row in range(3)]
    for row, adapter in enumerate(adapters):
        stack.put(row, ((str(row), 1.0),), adapter)
    x, y = np.ones((2, 7, 5)), np.ones((2, 7, 4))
    found = _slot(x, y, {name: view.numpy() for name, view in stack.part(1, 2).items()})
    np.testing.assert_allclose(found, [_slot(x[0], y[0], adapter) for adapter in adapters[1:]], rtol=1e-6)


@pytest.mark.parametrize(
    ("names", "declared", "expected"),
    [
        ({"l.A", "l.B", "l.g", "p+q.A", "p+q.B"}, set(), None),
        ({"l.A", "e.A"}, set(), "module 'e' is of type 'embedding', which takes one adapter for all rows"),
        ({"k.B"}, set(), "module 'k' is of type 'conv2d', which takes one adapter for all rows"),
        ({"l.g", "head.weight"}, set(), "parameter 'head.weight' is replaced whole, for all rows at once"),
        ({"l.A", "f.down", "f.up"}, set(), "a bottleneck beside module 'f' is one for all rows"),
        ({"p+q.A"}, {"p+q.A"}, "this bundle's graph takes one 'p+q.A' for all rows; another export may take more"),
    ],
)
def test_what_cannot_differ_between_rows_is_named(names, declared, expected):
    inputs = {name: SimpleNamespace(shape=("x", 3) if name in declared else ()) for name in names}
    assert obstacle(names, inputs, MANIFEST) == expected


def test_a_classifier_runs_rows_with_adapters_of_their_own(classifier):
    path, *_ = classifier
    rng = np.random.default_rng(1)
    inputs = {"input_ids": rng.integers(0, 256, (4, 6)), "attention_mask": np.ones((4, 6), np.int64)}
    adapters = ["a", None, {"a": 0.5}, "a"]
    with open_session(path, threads=1) as session:
        found = session.run(inputs, adapters=adapters)
        assert session.adapter is None
        assert sorted(found) == ["last_hidden_state", "logits"]
        for row, adapter in enumerate(adapters):
            session.use(adapter)
            alone = session.run({name: value[row : row + 1] for name, value in inputs.items()})
            for name, value in alone.items():
                np.testing.assert_allclose(found[name][row], value[0], rtol=1e-5, atol=1e-6)


def test_adapters_with_other_numbers_of_classes_are_refused():
    class Session:
        adapter = None
        inner = None

        @property
        def active(self):
            return self

        def key_of(self, adapter):
            return ((adapter, 1.0),)

        def use(self, adapter):
            self.inner = adapter

        def run(self, inputs, *, chunk_size):  # noqa: ARG002
            return {"logits": np.ones((len(inputs["x"]), {"a": 3, "b": 5, None: 3}[self.inner]), np.float32)}

    with pytest.raises(SessionError) as caught:
        run_groups(Session(), {"x": [[1], [2]]}, ["a", "b"], None)
    assert str(caught.value) == (
        "output 'logits' is [5] a row with adapter 'b' and [3] with 'a'; one array cannot hold both\n"
        "Hint: run adapters with different outputs in separate calls"
    )


def test_a_sequence_to_sequence_model_writes_with_adapters_of_their_own(seq2seq):
    path, _ = seq2seq
    texts, adapters = ["one", "three words here", "one"], ["a", None, None]
    with open_session(path, threads=1) as session:
        options = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 1.0}
        found = session.generate_batch(texts, adapters=adapters, seed=3, **options)
        for row, (text, adapter) in enumerate(zip(texts, adapters, strict=True)):
            session.use(adapter)
            assert found[row] == session.complete(text, seed=3 + row, **options)
