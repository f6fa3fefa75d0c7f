"""Every scheme on a decoder, a classifier, a convolutional net and a sequence-to-sequence model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeadapt import registry
from edgeadapt.addition import verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.runtime import open_session
from tests.e2e.conftest import Exported, Invoke, Tiny

GetTiny = Callable[[str], Tiny]

MODELS = ("llama", "bert", "resnet", "t5")
SCHEMES = ("none", "fp16", "int8", "int4")
SMALL_KL = {"none": 1e-9, "fp16": 1e-3, "int8": 0.05, "int4": 1.0}
"""Nats on random weights, on which nothing is robust; trained models lose less."""
POSITIONS = {"llama": 744, "bert": 12, "resnet": 16, "t5": 96}
KEEP = {"llama": "model.layers.0.*", "bert": "bert.encoder.layer.0.*", "resnet": "*", "t5": "encoder.*"}


def test_no_scheme_is_left_out() -> None:
    assert set(registry.names("edgeadapt.quantize.schemes")) == set(SCHEMES)


@pytest.fixture
def inputs_of() -> Callable[[str], dict[str, np.ndarray]]:
    def make(name: str) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(2)
        if name == "resnet":
            return {"pixel_values": generator.standard_normal((1, 3, 32, 32)).astype(np.float32)}
        ids = generator.integers(3, 128, (1, 7))
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if name == "t5":
            inputs["decoder_input_ids"] = generator.integers(3, 128, (1, 4))
        if name == "bert":
            inputs["token_type_ids"] = np.zeros_like(ids)
        return inputs

    return make


def check(bundle_path: Path, name: str, scheme: str, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """See that a bundle runs, that its adapters act, and that its quality was measured; return its record."""
    bundle = open_bundle(bundle_path)
    manifest = bundle.manifest
    assert verify_bundle(bundle_path) == []
    assert manifest.quantization["scheme"] == scheme
    assert [row["adapter"] for row in manifest.quality] == [None, "adapter0", "adapter1"]
    for row in manifest.quality:
        assert (row["scheme"], row["positions"]) == (scheme, POSITIONS[name])
        assert 0 <= row["mean_kl"] <= row["max_kl"] < SMALL_KL[scheme]
    assert manifest.quality[0]["top1"] > (0.5 if scheme == "int4" else 0.9)
    assert manifest.adapter_dtype == ("float32" if scheme == "none" else "float16")
    with open_session(bundle) as session:
        logits = []
        for adapter in (None, "adapter0", "adapter1"):
            session.use(adapter)
            logits.append(session.run(inputs)["logits"])
            assert np.isfinite(logits[-1]).all()
    scale = np.abs(logits[0]).max()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(logits[one] - logits[other]).max() > 1e-3 * scale
    return dict(manifest.quantization)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_every_scheme_on_every_kind_of_model(
    name: str, scheme: str, exported: Exported, inputs_of: Callable[[str], dict[str, np.ndarray]]
) -> None:
    path = exported(name, quantize=scheme)
    record = check(path, name, scheme, inputs_of(name))
    float_bytes = open_bundle(exported(name, quantize="none")).file("graph/weights.bin").stat().st_size
    stored = open_bundle(path).file("graph/weights.bin").stat().st_size
    share = {"none": 1.01, "fp16": 0.8, "int8": 0.7, "int4": 0.7}[scheme]
    assert stored <= share * float_bytes
    if scheme != "none":
        assert record["bytes_after"] < share * record["bytes_before"]


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_int4_calibrated_with_a_file(
    name: str, exported: Exported, inputs_of: Callable[[str], dict[str, np.ndarray]], tmp_path_factory: Any
) -> None:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(f"A text of some words, number {number}." for number in range(24)), encoding="utf-8")
    path = exported(name, quantize="int4", calibrate=file)
    manifest = open_bundle(path).manifest
    assert manifest.quantization["calibrated"] > 0
    assert verify_bundle(path) == []
    plain = open_bundle(exported(name, quantize="int4")).manifest
    assert plain.quantization["calibrated"] == 0
    assert [row["adapter"] for row in manifest.quality] == [None, "adapter0", "adapter1"]
    with open_session(path) as session:
        session.use("adapter0")
        assert np.isfinite(session.run(inputs_of(name))["logits"]).all()


@pytest.mark.parametrize("name", MODELS)
def test_exceptions(name: str, tiny: GetTiny, invoke: Invoke, tmp_path: Path, traced_once: None) -> None:
    model, out = tiny(name), tmp_path / "out.bundle"
    flags = ("--quantize", "int8", "--keep", f"{KEEP[name]}=fp16", "--json", "--quiet")
    result = invoke("export", *model.adapters, "--base", model.base, "--task", model.task, "-o", out, *flags)
    assert result.exit_code == 0, result.stderr
    kept = [row for row in json.loads(result.stdout)["quantization"]["kept"] if row["reason"].startswith("kept by")]
    assert kept
    assert {row["scheme"] for row in kept} == {"fp16"}
    assert {row["reason"] for row in kept} == {f"kept by {KEEP[name]!r}"}
    prefix = KEEP[name].removesuffix("*")
    assert all(row["path"].startswith(prefix) for row in kept)
    assert verify_bundle(out) == []
    with open_session(out) as session:
        assert session.adapters == ("adapter0", "adapter1")


def test_an_exception_for_a_layer_that_is_not_there(
    tiny: GetTiny, invoke: Invoke, tmp_path: Path, traced_once: None
) -> None:
    model = tiny("bert")
    flags = ("--base", model.base, "-o", tmp_path / "out.bundle", "--quiet")
    result = invoke("export", *model.adapters, *flags, "--keep", "bert.encoder.layer.7.*=none")
    assert (result.exit_code, result.stdout) == (1, "")
    message, hint = result.stderr.splitlines()
    assert message.startswith("error: the exception 'bert.encoder.layer.7.*' = 'none' matches none of the model's ")
    assert hint.startswith("hint: patterns are module paths with * for any text, such as bert.encoder.layer.")
    assert list(tmp_path.iterdir()) == []
