from __future__ import annotations

from pathlib import Path

import pytest

from edgeadapt import settings
from edgeadapt.errors import RecipeError
from edgeadapt.recipe import Recipe, read_recipe

GIVEN = {"adapters": ["a"], "base": "b", "output": "o"}


def test_defaults():
    recipe = read_recipe(None, GIVEN)
    assert recipe == Recipe(adapters=(Path("a"),), base="b", output=Path("o"))
    assert recipe.quantize == "int8"
    assert not recipe.merge


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"adapters": []}, "there is no adapter to export", "name at least one adapter folder"),
        ({"adapters": ["x", "x"]}, "adapters: 'x' occurs twice", "give every adapter once, by its own name"),
        ({"names": ["n", "n"]}, "names: 'n' occurs twice", "give every adapter once, by its own name"),
        ({"base": ""}, "base is empty", "give a folder, a GGUF file or a hub id"),
        (
            {"adapters": ["x", "y"], "merge": True},
            "merge takes one adapter, got 2",
            "export one merged bundle per adapter, or leave merge out to get one bundle that swaps them",
        ),
        (
            {"merge_base": "original"},
            "merge_base is 'original', and nothing is merged",
            "add merge, or leave merge_base out",
        ),
        ({"quantize": "int3"}, "quantize: unknown scheme 'int3'", "known: fp16, int4, int8, none"),
        ({"keep": {"a.*": "int3"}}, "keep['a.*']: unknown scheme 'int3'", "known: fp16, int4, int8, none"),
        (
            {"keep": {"a": "int8"}, "quantize": "none"},
            "keep has exceptions, and nothing is quantized",
            "set quantize, or leave keep out",
        ),
        ({"max_kl": -0.1}, "max_kl must be 0 or more, got -0.1", "0.02 is strict, 0.1 is loose"),
        (
            {"max_bytes": 70_000_000},
            "max_bytes is 70000000, and quantize is 'int8'",
            "only int4 trades bytes for quality: set quantize to int4, or leave max_bytes out",
        ),
        (
            {"max_bytes": 0, "quantize": "int4"},
            "max_bytes must be at least 1, got 0",
            "70000000 is 70 MB",
        ),
        ({"min_top1": 95}, "min_top1 must be between 0 and 1, got 95.0", "0.95 means 95 %"),
        ({"prune_kl": 0}, "prune_kl must be above 0, got 0.0", "0.001 is strict, 0.01 is loose"),
        (
            {"prune_kl": 0.01, "merge": True},
            "prune_kl is 0.01, and the adapter is merged into the weights",
            "leave out merge or prune_kl",
        ),
        (
            {"adapter_dtype": "int8", "merge": True},
            "adapter_dtype is 'int8', and the adapter is merged into the weights",
            "leave out merge or adapter_dtype",
        ),
        (
            {"adapter_dtype": "int4"},
            "export settings: field adapter_dtype must be one of 'float32', 'float16', 'int8', got the string 'int4'",
            "did you mean 'int8'? correct the value",
        ),
        (
            {"kv_cache": "int4"},
            "export settings: field kv_cache must be one of 'float32', 'int8', got the string 'int4'",
            "did you mean 'int8'? correct the value",
        ),
        ({"block_size": 48}, "block_size is 48", "give one of 16, 32, 64, 128, 256"),
        ({"block_size": 64, "quantize": "none"}, "block_size is 64, and none has no blocks", "choose int8 or int4"),
        ({"max_length": 0}, "max_length must be at least 1, got 0", "leave it out for the model's own limit"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message, hint):
    with pytest.raises(RecipeError) as caught:
        read_recipe(None, {**GIVEN, **change})
    assert (caught.value.message, caught.value.hint) == (message, hint)


def _write(folder: Path, text: str) -> Path:
    file = folder / "my.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_unknown_keys_are_errors(tmp_path):
    file = _write(tmp_path, 'adapters = ["a"]\nbase = "b"\noutput = "o"\nquantise = "int8"\n')
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert caught.value.message == f"{file}: unknown field quantise"
    assert caught.value.hint.startswith("did you mean 'quantize'? known fields: adapters, base, output, ")


def test_missing_and_wrong_fields_are_errors(tmp_path):
    with pytest.raises(RecipeError) as caught:
        read_recipe(_write(tmp_path, 'adapters = ["a"]\noutput = "o"\n'))
    assert caught.value.message == f"{tmp_path / 'my.toml'}: field base is missing"
    with pytest.raises(RecipeError) as caught:
        read_recipe(_write(tmp_path, 'adapters = ["a"]\nbase = "b"\noutput = 3\n'))
    assert caught.value.message == f"{tmp_path / 'my.toml'}: field output must be a path (a string), got the number 3"


def test_broken_and_absent_files_are_errors(tmp_path):
    with pytest.raises(RecipeError) as caught:
        read_recipe(_write(tmp_path, "adapters = ["))
    assert caught.value.message.startswith(f"{tmp_path / 'my.toml'}: not valid TOML: ")
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "none.toml")
    assert caught.value.message == f"there is no recipe file {tmp_path / 'none.toml'}"


def test_paths_in_a_file_are_relative_to_it_and_hub_ids_stay(tmp_path):
    (tmp_path / "local").mkdir()
    text = 'adapters = ["a", "/abs"]\noutput = "o"\ncalibrate = "c.txt"\nbase = "{}"\n'
    recipe = read_recipe(_write(tmp_path, text.format("org/model")))
    assert recipe.adapters == (tmp_path / "a", Path("/abs"))
    assert (recipe.output, recipe.calibrate, recipe.base) == (tmp_path / "o", tmp_path / "c.txt", "org/model")
    assert read_recipe(_write(tmp_path, text.format("local"))).base == str(tmp_path / "local")
    assert read_recipe(_write(tmp_path, text.format("./not-yet"))).base == str(tmp_path / "not-yet")


@pytest.mark.parametrize("name", settings.names("recipes"))
def test_every_shipped_recipe_is_whole(name):
    file = settings.find("recipes", name)
    assert settings.summary(file)
    given = settings.read(file)
    # A recipe for any adapter of a family leaves adapter and target to the command line.
    rest = {key: value for key, value in GIVEN.items() if key not in given}
    recipe = read_recipe(name, rest)
    assert set(rest) in (set(), {"adapters", "output"})
    assert all(folder.is_dir() for folder in recipe.adapters if "adapters" in given)
