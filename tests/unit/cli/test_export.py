"""What flags mean, and how a bundle is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeadapt.recipe import Recipe


@pytest.fixture
def asked(replace, bundle):
    """The recipes that `export` handed to the pipeline."""
    recipes: list[Recipe] = []

    def export_bundle(recipe, progress):
        with progress.stage("export graph"):
            progress.advance(1, 1)
        recipes.append(recipe)
        return bundle

    replace("edgeadapt.pipeline", export_bundle=export_bundle)
    return recipes


def test_every_flag_reaches_the_recipe(invoke, asked):
    result = invoke(
        "export", "a b", "c", "--base", "hub/base", "-o", "out.bundle", "--name", "x", "--name", "y", "--task", "t",
        "--revision", "abc", "--quantize", "int4", "--block-size", "64",
        "--keep", "*.down_proj=int8", "--keep", "a=b=none",
        "--calibrate", "text.txt", "--max-bytes", "70000000", "--max-kl", "0.1", "--min-top1", "0.9",
        "--prune-kl", "0.01", "--adapter-dtype",
        "int8", "--max-length", "512", "--force",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert asked == [
        Recipe(
            adapters=(Path("a b"), Path("c")),
            base="hub/base",
            output=Path("out.bundle"),
            names=("x", "y"),
            task="t",
            revision="abc",
            quantize="int4",
            block_size=64,
            keep={"*.down_proj": "int8", "a=b": "none"},
            calibrate=Path("text.txt"),
            max_bytes=70_000_000,
            max_kl=0.1,
            min_top1=0.9,
            prune_kl=0.01,
            adapter_dtype="int8",
            max_length=512,
            force=True,
        )
    ]


def test_merge_flags_reach_the_recipe(invoke, asked):
    result = invoke("export", "a", "--base", "b", "-o", "o", "--merge", "--merge-base", "original")
    assert result.exit_code == 0, result.stderr
    assert asked == [Recipe((Path("a"),), "b", Path("o"), merge=True, merge_base="original")]


def test_flags_override_the_recipe_file_and_paths_in_the_file_are_relative_to_it(invoke, asked, tmp_path):
    folder = tmp_path / "my recipes"
    folder.mkdir()
    file = folder / "r.toml"
    file.write_text('adapters = ["one"]\nbase = "./base"\noutput = "x.bundle"\nmerge = true\nquantize = "int4"\n')
    result = invoke("export", "--recipe", file, "--no-merge", "--quantize", "none", "-o", "here.bundle")
    assert result.exit_code == 0, result.stderr
    assert asked == [Recipe((folder / "one",), str(folder / "base"), Path("here.bundle"), quantize="none")]


def test_settings_that_contradict_are_refused_before_anything_runs(invoke, asked):
    result = invoke("export", "a", "b", "--base", "x", "-o", "o", "--merge")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: merge takes one adapter, got 2\n"
        "hint: export one merged bundle per adapter, or leave merge out to get one bundle that swaps them\n"
    )
    assert asked == []


def test_json_is_alone_on_stdout(invoke, asked, bundle):
    result = invoke("export", "a", "--base", "b", "-o", "o", "--json")
    summary = json.loads(result.stdout)
    assert summary["path"] == str(bundle.path)
    assert list(summary["adapters"]) == ["sql[r, in]"]
    assert summary["quality"] == [{"adapter": "sql[r, in]", "mean_kl": 0.0023, "top1": 0.98}]
    assert summary["quantization"] == {"scheme": "int8"}
    assert summary["base"]["fingerprint"] == "11" * 32
    assert summary["bytes"] == {"weights": 1000, "adapter": 24, "total": 1024}
    assert "export graph" in result.stderr


def test_quiet_shows_nothing(invoke, asked):
    result = invoke("export", "a", "--base", "b", "-o", "o", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_people_see_tables_on_stderr(invoke, asked):
    result = invoke("export", "a", "--base", "b", "-o", "o")
    assert result.stdout == ""
    assert "sql[r, in]" in result.stderr
    assert "mean kl" in result.stderr
    assert "0.0023" in result.stderr
