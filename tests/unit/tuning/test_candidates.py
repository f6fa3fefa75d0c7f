"""Which exports follow from which settings to try."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeadapt import settings
from edgeadapt.errors import RecipeError
from edgeadapt.recipe import Recipe, read_recipe
from edgeadapt.tuning.candidates import candidates, read_tries, recipe_toml

SQL = ("sql", Path("adapters/sql"))


def _recipe(*adapters: str, **fields: object) -> Recipe:
    return Recipe(tuple(Path(f"adapters/{name}") for name in adapters), "base", Path("m.bundle"), **fields)


def _labels(recipe: Recipe, **tries: tuple[object, ...]) -> list[str]:
    return [each.label for each in candidates(recipe, tries, SQL)]


def test_the_usual_ones_each_once():
    assert _labels(_recipe("sql", "json")) == ["none", "int8", "int8 block_size=64", "int4", "int4 block_size=64"]
    one = _labels(_recipe("sql"), block_size=(32,))
    assert one == ["none", "none merge", "int8", "int8 merge", "int4", "int4 merge"]


def test_a_merged_one_takes_the_active_adapter_alone():
    found = candidates(_recipe("sql", "json"), {"quantize": ("int8",), "merge": (False, True)}, SQL)
    assert [each.recipe.names for each in found if each.recipe.merge] == [("sql",)] * 2
    assert found[0].recipe.adapters == (Path("adapters/sql"), Path("adapters/json"))
    assert {each.recipe.adapters for each in found if each.recipe.merge} == {(Path("adapters/sql"),)}


def test_what_contradicts_is_left_out_and_told():
    recipe = _recipe("sql", quantize="int4", max_bytes=70_000_000, patches=True)
    found = {each.label: each for each in candidates(recipe, {"merge": (False,)}, SQL)}
    assert found["int4"].recipe.max_bytes == 70_000_000
    assert found["int4"].notes == ()
    assert found["int8"].recipe.max_bytes is None
    assert found["int8"].notes == ("int8: without max_bytes, which contradicts it",)
    assert set(found["none"].notes) == {
        f"none: without {key}, which contradicts it" for key in ("max_bytes", "patches")
    }


def test_values_are_read_as_toml():
    assert read_tries({"quantize": "int8,none", "block_size": "32,64", "merge": "true,false", "max_kl": "0.05"}) == {
        "quantize": ("int8", "none"),
        "block_size": (32, 64),
        "merge": (True, False),
        "max_kl": (0.05,),
    }
    with pytest.raises(RecipeError, match="'output' is nothing to try") as caught:
        read_tries({"output": "x"})
    assert "residual_rank" in caught.value.hint


@pytest.mark.parametrize(
    ("tries", "message"),
    [
        ({"quantize": ("int3",)}, "unknown scheme 'int3'"),
        ({"block_size": ("big",)}, "field block_size must be"),
        ({"quantize": ("int8",), "block_size": (33,)}, "block_size is 33"),
    ],
)
def test_wrong_values_are_refused(tries, message):
    with pytest.raises(RecipeError, match=message):
        candidates(_recipe("sql", "json"), tries, SQL)


def test_one_wrong_value_of_several_is_refused_too():
    with pytest.raises(RecipeError, match="unknown scheme 'int3'"):
        candidates(_recipe("sql"), {"quantize": ("int8", "int3")}, SQL)


def test_a_recipe_is_the_same_after_its_file(tmp_path):
    made = Recipe(
        (tmp_path / "a", tmp_path / "b"),
        "org/base",
        tmp_path / "m.bundle",
        quantize="int4",
        keep={'*.down "proj"': "int8"},
        max_kl=0.05,
        min_top1=1.0,
        residual_rank=8,
    )
    (tmp_path / "recipe.toml").write_text(recipe_toml(made, "one"), encoding="utf-8")
    assert settings.summary(tmp_path / "recipe.toml") == "one"
    assert read_recipe(tmp_path / "recipe.toml") == made
