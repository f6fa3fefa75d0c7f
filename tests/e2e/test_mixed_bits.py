"""4 and 8 bits mixed within the user's limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeadapt.addition import verify_bundle
from edgeadapt.bundle import open_bundle
from tests.e2e.conftest import Exported, Invoke, Tiny


def test_a_divergence_is_kept_by_raising_layers(exported: Exported) -> None:
    plain = open_bundle(exported("llama", quantize="int4")).manifest
    worst = max(row["mean_kl"] for row in plain.quality)

    path = exported("llama", quantize="int4", max_kl=0.6 * worst)

    manifest = open_bundle(path).manifest
    assert verify_bundle(path) == []
    assert max(row["mean_kl"] for row in manifest.quality) <= 0.6 * worst
    raised = [entry for entry in manifest.quantization["kept"] if entry["reason"] == "raised to 8 bits"]
    assert raised
    assert {entry["scheme"] for entry in raised} == {"int8"}
    assert manifest.quantization["bytes_after"] > plain.quantization["bytes_after"]


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_bytes_are_kept_and_used(name: str, exported: Exported) -> None:
    ends = [
        open_bundle(exported(name, quantize=scheme)).manifest.quantization["bytes_after"] for scheme in ("int4", "int8")
    ]
    budget = sum(ends) // 2
    manifest = open_bundle(exported(name, quantize="int4", max_bytes=budget)).manifest
    assert ends[0] < manifest.quantization["bytes_after"] <= budget
    raised = {entry["path"] for entry in manifest.quantization["kept"] if entry["reason"] == "raised to 8 bits"}
    for path in raised:
        if path.endswith("q_proj"):
            assert {path.replace("q_proj", other) for other in ("k_proj", "v_proj")} <= raised


def test_limits_that_cannot_be_kept_leave_nothing(
    tiny: Callable[[str], Tiny], invoke: Invoke, tmp_path: Path, traced_once: None
) -> None:
    model = tiny("bert")
    flags = ("--base", model.base, "--task", model.task, "-o", tmp_path / "out.bundle", "--quiet", "--quantize", "int4")
    result = invoke("export", *model.adapters, *flags, "--max-bytes", "10")
    assert (result.exit_code, result.stdout) == (1, "")
    message, hint = result.stderr.splitlines()
    assert message.startswith("error: max_bytes is 10, and the weights take ")
    assert hint.startswith("hint: allow at least ")
    result = invoke("export", *model.adapters, *flags, "--max-kl", "0")
    assert result.exit_code == 1
    assert "error: a mean KL divergence of at most 0 cannot be kept: the best is " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_samples_that_are_an_adapters_own(
    tiny: Callable[[str], Tiny], invoke: Invoke, tmp_path: Path, traced_once: None
) -> None:
    model = tiny("bert")
    file = tmp_path / "samples.jsonl"
    lines = [
        {"text": f"A text of some words, number {number}.", "adapter": f"adapter{number % 2}"} for number in range(24)
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    out = tmp_path / "out.bundle"
    flags = ("--base", model.base, "--task", model.task, "-o", out, "--quiet", "--json", "--quantize", "int4")
    result = invoke("export", *model.adapters, *flags, "--calibrate", file)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["quantization"]["calibrated"] > 0
    rows = {row["adapter"]: row["positions"] for row in open_bundle(out).manifest.quality}
    assert rows == {None: 6, "adapter0": 3, "adapter1": 3}


def test_a_share_of_equal_answers_is_kept_by_raising_layers(exported: Exported) -> None:
    rows = {scheme: open_bundle(exported("llama", quantize=scheme)).manifest.quality for scheme in ("int4", "int8")}
    worst, best = (min(row["top1"] for row in rows[scheme]) for scheme in ("int4", "int8"))
    assert worst < best
    manifest = open_bundle(exported("llama", quantize="int4", min_top1=best)).manifest
    assert min(row["top1"] for row in manifest.quality) >= best
    assert any(entry["reason"] == "raised to 8 bits" for entry in manifest.quantization["kept"])
