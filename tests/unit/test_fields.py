from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeadapt.errors import RecipeError
from edgeadapt.fields import from_mapping, to_mapping


@dataclass(frozen=True)
class Inner:
    size: int
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["slow", "fast"]
    path: Path
    axes: tuple[int | str, ...]
    pair: tuple[int, str]
    inner: Inner
    maybe: Inner | None = None
    table: Mapping[str, Inner] = field(default_factory=dict)
    free: Any = None
    flag: bool = False


INNERS = st.builds(Inner, st.integers(), st.floats(allow_nan=False, allow_infinity=False))
OUTERS = st.builds(
    Outer,
    name=st.text(),
    kind=st.sampled_from(["slow", "fast"]),
    path=st.sampled_from([Path("a/b"), Path("/x y")]),
    axes=st.lists(st.integers() | st.text()).map(tuple),
    pair=st.tuples(st.integers(), st.text()),
    inner=INNERS,
    maybe=st.none() | INNERS,
    table=st.dictionaries(st.text(), INNERS),
    free=st.none() | st.text() | st.lists(st.integers()),
    flag=st.booleans(),
)
GOOD = {"name": "n", "kind": "slow", "path": "p", "axes": [1, "n"], "pair": [1, "x"], "inner": {"size": 3}}


@given(OUTERS)
def test_there_and_back(value):
    assert from_mapping(Outer, to_mapping(value), "f", RecipeError) == value


@given(
    st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Outer)]), st.none() | st.text() | st.floats())
)
def test_whatever_comes_is_a_value_or_the_callers_error(data):
    try:
        result = from_mapping(Outer, GOOD | data, "f", RecipeError)
    except RecipeError as error:
        result = error.message
    assert isinstance(result, Outer) or result.startswith("f: ")


def test_defaults_and_integers_for_numbers():
    assert from_mapping(Outer, GOOD, "f", RecipeError).inner == Inner(3, 0.5)
    ratio = from_mapping(Inner, {"size": 1, "ratio": 2}, "f", RecipeError).ratio
    assert (ratio, type(ratio)) == (2.0, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"nmae": 1},
            (
                "f: unknown field nmae\nHint: did you mean 'name'? known fields: name, kind, path, axes, pair, "
                "inner, maybe, table, free, flag"
            ),
        ),
        ({"inner": {}}, "f: field inner.size is missing\nHint: add it: an integer"),
        (
            {"inner": {"size": 1, "sise": 2}},
            "f: unknown field inner.sise\nHint: did you mean 'size'? known fields: size, ratio",
        ),
        ({"inner": 3}, "f: field inner must be a table of fields, got the number 3\nHint: correct the value"),
        ({"inner": {"size": True}}, "f: field inner.size must be an integer, got true\nHint: correct the value"),
        (
            {"inner": {"size": 1.0}},
            "f: field inner.size must be an integer, got the number 1.0\nHint: correct the value",
        ),
        (
            {"inner": {"size": 1, "ratio": float("nan")}},
            "f: field inner.ratio must be a finite number, got the number nan\nHint: correct the value",
        ),
        ({"name": None}, "f: field name must be a string, got null\nHint: correct the value"),
        (
            {"kind": "fats"},
            (
                "f: field kind must be one of 'slow', 'fast', got the string 'fats'\n"
                "Hint: did you mean 'fast'? correct the value"
            ),
        ),
        ({"path": 3}, "f: field path must be a path (a string), got the number 3\nHint: correct the value"),
        ({"axes": "ab"}, "f: field axes must be a list, got the string 'ab'\nHint: correct the value"),
        (
            {"axes": [1, 2.5]},
            "f: field axes[1] must be an integer or a string, got the number 2.5\nHint: correct the value",
        ),
        ({"pair": [1]}, "f: field pair must have 2 items, got 1\nHint: correct the list"),
        (
            {"maybe": {"size": "x"}},
            "f: field maybe.size must be an integer, got the string 'x'\nHint: correct the value",
        ),
        (
            {"table": {"a/b": {"size": []}}},
            "f: field table['a/b'].size must be an integer, got a list\nHint: correct the value",
        ),
        ({"table": {"a": 1}}, "f: field table.a must be a table of fields, got the number 1\nHint: correct the value"),
        ({"flag": 1}, "f: field flag must be true or false, got the number 1\nHint: correct the value"),
    ],
)
def test_messages(change, message):
    with pytest.raises(RecipeError) as caught:
        from_mapping(Outer, GOOD | change, "f", RecipeError)
    assert str(caught.value) == message


def test_a_missing_field_and_no_table():
    with pytest.raises(RecipeError, match="f: field name is missing"):
        from_mapping(Outer, {}, "f", RecipeError)
    with pytest.raises(RecipeError, match="f: it must be a table of fields, got a list"):
        from_mapping(Outer, [], "f", RecipeError)


@dataclass(frozen=True)
class Checked:
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}, must be above 0")


def test_a_value_error_of_the_class_itself():
    with pytest.raises(RecipeError, match="f: size is 0, must be above 0"):
        from_mapping(Checked, {"size": 0}, "f", RecipeError)


def test_to_mapping():
    assert to_mapping(Inner(np.int64(3), np.float32(0.5))) == {"size": 3, "ratio": 0.5}
    assert "maybe" not in to_mapping(from_mapping(Outer, GOOD, "f", RecipeError), skip_none=True)
    with pytest.raises(TypeError, match="is not a dataclass instance"):
        to_mapping({})
    with pytest.raises(TypeError, match="a ndarray cannot be written as a field"):
        to_mapping(Inner(np.zeros(2)))


def test_a_field_type_that_is_not_supported_is_a_bug():
    @dataclass(frozen=True)
    class Odd:
        data: bytes

    with pytest.raises(TypeError, match="are not supported"):
        from_mapping(Odd, {"data": "x"}, "f", RecipeError)
