"""Graphs in .ort format: converted here, opened by plain ONNX Runtime."""

from __future__ import annotations

import json
import shutil

import onnxruntime as ort
import pytest

from edgeadapt.bundle import open_bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import profile
from edgeadapt.profiling.job import Shapes
from edgeadapt.profiling.runtimes import ort_mobile

SMALL = {"threads": 1, "prompt_tokens": 8, "new_tokens": 5, "repeats": 2, "attempts": 1}
HERE = Device("here", "this machine", "cpu")


@pytest.fixture(scope="module")
def made(decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, ort_mobile.prepare(open_bundle(decoder), HERE, folder, Shapes(1, 8, 13))


def test_graphs_hold_their_weights_and_keep_adapters_inputs(decoder, made):
    folder, models = made
    assert sorted(path.name for path in (folder / "model").iterdir()) == ["decoder.plain.ort", "decoder.slots.ort"]
    for form, path in models.files.items():
        assert (folder / path).read_bytes()[4:8] == b"ORTM"
        converted = ort.InferenceSession(folder / path)
        original = ort.InferenceSession(decoder / "graph" / f"decoder.{form}.onnx")
        for ask in ("get_inputs", "get_overridable_initializers", "get_outputs"):
            names = [{each.name for each in getattr(session, ask)()} for session in (converted, original)]
            assert names[0] == names[1]


def test_what_a_build_needs_is_beside_the_models(made):
    folder, models = made
    needed = (folder / "reports" / ort_mobile.CONFIG).read_text()
    assert "com.microsoft;1;" in needed
    assert "GroupQueryAttention" in needed
    assert "Model should perform well with NNAPI as is" in (folder / "reports" / ort_mobile.USABILITY).read_text()
    assert models.notes[0].startswith("good on a phone's accelerators, by ONNX Runtime's own check? NNAPI as is: ")
    assert "CoreML MLProgram as is: " in models.notes[0]
    assert models.notes[1].startswith("operators that a build of ONNX Runtime needs for it: ai.onnx ")
    assert not any("\n" in note for note in models.notes)
    assert sorted(path.name for path in folder.iterdir()) == ["model", "reports"]


def test_its_answers_are_the_goldens(decoder):
    found = profile(decoder, runtime="ort-mobile", **SMALL)
    assert [check.adapter for check in found.checks] == [None, "a", "b"]
    assert all(check.relative_error < 1e-5 for check in found.checks)
    assert (found.runtime, found.failures) == ("ort_mobile", ())
    assert found.sizes.model_bytes > 0
    assert any("count them twice" in note for note in found.notes)
    json.dumps(found.to_json(), allow_nan=False)


def test_without_adapters_there_is_one_graph(seq2seq, helpers, tmp_path):
    path = tmp_path / "merged.bundle"
    helpers[1].write_decoder(path, {}, merged="support")
    models = ort_mobile.prepare(open_bundle(path), HERE, tmp_path, Shapes(1, 8, 13))
    assert list(models.files) == ["plain"]
    assert not any("twice" in note for note in models.notes)
    with pytest.raises(ProfileError, match="measures bundles of one graph"):
        profile(seq2seq, runtime="ort-mobile", **SMALL)


@pytest.mark.parametrize("package", ["onnx", "flatbuffers"])
def test_a_missing_converter_is_told(package, monkeypatch):
    monkeypatch.setattr(ort_mobile, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ProfileError) as caught:
        ort_mobile.require(HERE)
    assert str(caught.value) == (
        f"{package} is not installed, which converts graphs to .ort format here\nHint: pip install 'edgeadapt[export]'"
    )


def test_another_provider_is_refused():
    with pytest.raises(ProfileError, match=r"graphs in \.ort format are measured on the CPU, not on 'cuda'"):
        ort_mobile.require(Device("gpu", "a GPU", "cuda"))


def test_a_graph_that_cannot_be_converted_is_an_error(decoder, tmp_path, monkeypatch):
    real = ort_mobile.graphs_of

    def broken(bundle, folder):
        files = real(bundle, folder)
        target = folder / files["plain"]
        target.unlink()
        target.write_bytes(b"no model")
        return files

    monkeypatch.setattr(ort_mobile, "graphs_of", broken)
    with pytest.raises(ProfileError, match=r"convert_onnx_models_to_ort failed: .*decoder\.plain\.onnx"):
        ort_mobile.prepare(open_bundle(decoder), HERE, tmp_path, Shapes(1, 8, 13))
    shutil.rmtree(tmp_path)


def test_a_check_without_a_verdict_is_an_error():
    with pytest.raises(ProfileError, match="gave no verdict"):
        ort_mobile.verdict_of("INFO: hello")


def test_operators_are_told_without_their_types():
    config = """# Generated from model/s:
ai.onnx;13;Concat{"inputs": {"0": ["int64_t"]}},Tanh{"inputs": {"0": ["float"]}, "outputs": {"0": ["float"]}},Neg
ai.onnx;21;Shape,Concat
com.microsoft;1;MatMulNBits
"""
    assert ort_mobile.needed_of(config) == (
        "operators that a build of ONNX Runtime needs for it: "
        "ai.onnx Concat, Neg, Shape, Tanh; com.microsoft MatMulNBits"
    )


def test_quantized_values_may_stay_so_on_arm():
    assert ort_mobile._options(Device("pi", "a Pi", "cpu", machine="aarch64"))[-2:] == ("--target_platform", "arm")
    assert "arm" not in ort_mobile._options(Device("pc", "a PC", "cpu", machine="x86_64"))
