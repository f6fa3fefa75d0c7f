"""Every shipped recipe, run by the program: four on the real models that they name, two on tiny ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import T5ForConditionalGeneration, ViTForImageClassification

from edgeadapt import settings
from tests.e2e.conftest import Invoke, Shipped, Tiny

SQL_PROMPT = "Table books(title, author, genre, year, pages). How many books were published after 2010?"
SQL_ANSWER = "SELECT COUNT(*) FROM books WHERE year > 2010;"
Rows = Mapping[str | None, Mapping[str, Any]]


def _quality(shipped: Shipped) -> Rows:
    return {row["adapter"]: row for row in shipped.summary["quality"]}


def test_every_recipe_is_run_here() -> None:
    run = {"int4", "merged", "minilm-classifier", "smollm2-chat", "t5", "vit"}
    assert set(settings.names("recipes")) == run


@pytest.mark.slow
def test_smollm2_chat(shipped: Callable[[str], Shipped], invoke: Invoke) -> None:
    made = shipped("smollm2-chat")
    assert set(made.summary["adapters"]) == {"sql", "json"}
    assert (made.summary["task"], made.summary["merged"]) == ("text-generation", None)
    assert made.summary["quantization"]["scheme"] == "int8"
    rows = _quality(made)
    assert set(rows) == {None, "sql", "json"}
    assert all(row["mean_kl"] < 0.05 and row["top1"] > 0.9 for row in rows.values())  # the recipe's own gate
    assert made.summary["parity"]["max_relative_error"] < 1e-4
    assert made.summary["bytes"]["total"] < 200e6
    assert invoke("verify", made.path, "--quiet").exit_code == 0


@pytest.mark.slow
def test_minilm_classifier(shipped: Callable[[str], Shipped], invoke: Invoke) -> None:
    made = shipped("minilm-classifier")
    assert set(_quality(made)) == {"debian-section"}  # the base has no head of its own to compare
    row = _quality(made)["debian-section"]
    assert row["positions"] == 400
    assert row["reference_accuracy"] > 0.8
    assert abs(row["accuracy"] - row["reference_accuracy"]) <= 0.01

    texts = ["Python module to parse dates", "3D first person shooter", "Mail user agent for the terminal"]
    flags = [part for text in texts for part in ("--text", text)]
    result = invoke("run", made.path, "--adapter", "debian-section", *flags, "--json")
    assert [answer["label"] for answer in json.loads(result.stdout)["answers"]] == ["python", "games", "mail"]


@pytest.mark.slow
def test_merged(shipped: Callable[[str], Shipped], invoke: Invoke) -> None:
    made = shipped("merged")
    summary = made.summary
    assert (summary["merged"], summary["adapters"], summary["slots"]) == ("sql", {}, 0)
    assert summary["parity"]["merge"]["max_relative_error"] < 1e-4  # the merged weights against the unmerged forward
    assert set(_quality(made)) == {None}
    assert _quality(made)[None]["top1"] > 0.9

    result = invoke("run", made.path, "--prompt", SQL_PROMPT, "--max-new-tokens", "40", "--json")
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["adapter"]) == (SQL_ANSWER, "sql")
    assert invoke("verify", made.path, "--quiet").exit_code == 0


@pytest.mark.slow
def test_int4_says_that_it_ruins_the_model(shipped: Callable[[str], Shipped]) -> None:
    made = shipped("int4")
    rows = _quality(made)
    name, worst = min(rows.items(), key=lambda item: item[1]["top1"])
    assert 0.7 < worst["top1"] < 0.9
    assert max(row["mean_kl"] for row in rows.values()) > 0.1
    of = "" if name is None else f" of adapter {name!r}"
    assert (
        f"warning: int4 changes the most likely answer{of} at {1 - worst['top1']:.0%} of positions "
        f"(mean KL {worst['mean_kl']:.2g}): this model is ruined at int4; use int8, or --calibrate FILE\n"
    ) in made.told
    assert made.summary["quantization"]["scheme"] == "int4"
    assert 4 < made.summary["quantization"]["linear_bits_per_weight"] < 8


def _export(invoke: Invoke, recipe: str, model: Tiny, output: Path) -> dict[str, Any]:
    result = invoke("export", "--recipe", recipe, *model.adapters, "--base", model.base, "-o", output, "--json")
    assert result.exit_code == 0, result.stderr
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


def _run(invoke: Invoke, bundle: Path, adapter: str, inputs: dict[str, Any], folder: Path) -> Any:
    np.savez(folder / "inputs.npz", **inputs)
    flags = ("--adapter", adapter, "--inputs", folder / "inputs.npz", "--output", folder / "outputs.npz")
    result = invoke("run", bundle, *flags, "--quiet")
    assert result.exit_code == 0, result.stderr
    with np.load(folder / "outputs.npz") as outputs:
        return outputs["logits"]


@torch.no_grad()
def _by_peft(model: torch.nn.Module, adapter: Path, inputs: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(model, adapter).eval()
    return tuned(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()


def test_vit(tiny: Callable[[str], Tiny], invoke: Invoke, tmp_path: Path) -> None:
    model, output = tiny("vit"), tmp_path / "vit.bundle"
    summary = _export(invoke, "vit", model, output)
    assert (summary["task"], summary["quantization"]["scheme"]) == ("image-classification", "fp16")

    inputs = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
    one, two = (
        _by_peft(ViTForImageClassification.from_pretrained(model.base), path, inputs) for path in model.adapters
    )
    allowed = 5e-3 * np.abs(one).max()
    assert np.abs(one - two).max() > 3 * allowed  # so that a mixed-up adapter is seen
    for adapter, expected in zip(model.adapters, (one, two), strict=True):
        assert np.abs(_run(invoke, output, adapter.name, inputs, tmp_path) - expected).max() < allowed


def test_t5(tiny: Callable[[str], Tiny], invoke: Invoke, tmp_path: Path) -> None:
    model, output = tiny("t5"), tmp_path / "t5.bundle"
    summary = _export(invoke, "t5", model, output)
    assert (summary["task"], summary["quantization"]["scheme"]) == ("text2text-generation", "int8")
    assert set(summary["graphs"]) == {"encoder", "decoder"}

    rng = np.random.default_rng(0)
    inputs = {
        "input_ids": rng.integers(3, 128, (2, 9)),
        "attention_mask": np.ones((2, 9), np.int64),
        "decoder_input_ids": rng.integers(3, 128, (2, 5)),
    }
    one, two = (
        _by_peft(T5ForConditionalGeneration.from_pretrained(model.base), path, inputs) for path in model.adapters
    )
    allowed = 0.1 * np.abs(one).max()
    assert np.abs(one - two).max() > 3 * allowed  # so that a mixed-up adapter is seen
    for adapter, expected in zip(model.adapters, (one, two), strict=True):
        assert np.abs(_run(invoke, output, adapter.name, inputs, tmp_path) - expected).max() < allowed
