"""OpenVINO beside the goldens, where it is installed; what needs none of it, everywhere."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edgeadapt.bundle import open_bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import profile
from edgeadapt.profiling.job import Shapes
from edgeadapt.profiling.runtimes import openvino

SMALL = {"threads": 1, "prompt_tokens": 8, "new_tokens": 5, "repeats": 2, "attempts": 1}
HERE = Device("here", "this machine", "cpu")


@pytest.fixture(scope="module")
def device():
    python = os.environ.get("EDGEADAPT_OPENVINO_PYTHON", sys.executable if find_spec("openvino") else None)
    if python is None:
        pytest.skip("pip install openvino numpy, here or in the environment of EDGEADAPT_OPENVINO_PYTHON=…/python")
    return Device("here", "this machine", "cpu", interpreter=python)


def test_every_input_is_a_required_one(decoder, tmp_path):
    models = openvino.prepare(open_bundle(decoder), HERE, tmp_path, Shapes(1, 8, 13))
    tensors = open_bundle(decoder).graph_tensors("a")
    assert set(models.files) == {"plain", "slots"}
    for form, path in models.files.items():
        session = onnxruntime.InferenceSession(tmp_path / path)
        assert session.get_overridable_initializers() == []
        assert {each.name for each in session.get_inputs()} >= (set(tensors) if form == "slots" else {"input_ids"})
    original = onnxruntime.InferenceSession(decoder / "graph" / "decoder.slots.onnx")
    optional = {each.name: each.type for each in original.get_overridable_initializers()}
    assert set(models.defaults) == set(optional) >= set(tensors)
    for name, value in tensors.items():
        assert models.defaults[name].dtype == value.dtype
        assert 0 in models.defaults[name].shape  # rank 0: an idle slot


def test_the_bundles_own_files_are_left_alone(decoder, tmp_path):
    before = {path: path.read_bytes() for path in decoder.rglob("*.onnx")}
    openvino.prepare(open_bundle(decoder), HERE, tmp_path, Shapes(1, 8, 13))
    assert {path: path.read_bytes() for path in decoder.rglob("*.onnx")} == before


def test_another_provider_is_refused():
    with pytest.raises(ProfileError, match="OpenVINO is measured on the CPU, not on 'cuda'"):
        openvino.require(Device("gpu", "a GPU", "cuda"))


def test_without_openvino_the_command_that_installs_it_is_told(decoder, monkeypatch):
    monkeypatch.setattr(openvino, "find_spec", {}.get)
    monkeypatch.delenv(openvino.VARIABLE, raising=False)
    with pytest.raises(ProfileError) as caught:
        profile(decoder, runtime="openvino", **SMALL)
    assert str(caught.value) == (
        "openvino is not installed\nHint: pip install 'edgeadapt[openvino]', or scripts/install-runtime openvino; on "
        "another machine: pip install openvino numpy; or let --interpreter or EDGEADAPT_OPENVINO_PYTHON name a Python "
        "that has it"
    )


@pytest.mark.skipif(find_spec("openvino") is not None, reason="this Python has openvino")
def test_a_python_without_openvino_is_told(decoder):
    python = str(Path(sys.executable))
    with pytest.raises(ProfileError) as caught:
        profile(decoder, runtime="openvino", device=Device("here", "here", "cpu", interpreter=python), **SMALL)
    assert str(caught.value) == f"openvino is not installed\nHint: {openvino.INSTALL}"


@pytest.mark.parametrize(("name", "adapters"), [("decoder", ["a", "b"]), ("classifier", ["a"])])
def test_its_answers_are_the_goldens(name, adapters, device, request):
    found = profile(request.getfixturevalue(name), runtime="openvino", device=device, operators=True, **SMALL)
    assert [check.adapter for check in found.checks if check.output == "logits"] == [None, *adapters]
    assert all(check.relative_error < 1e-4 for check in found.checks)  # float32 in another order of summing
    assert found.failures == ()
    assert found.adapter_tax.adapter == "a"
    assert found.adapter_tax.idle_ratio > 0
    assert found.sizes.model_bytes > 0
    assert {row.adapter for row in found.operators} == {False, True}
    times = [row.seconds for row in found.operators]
    assert times == sorted(times, reverse=True)
    assert np.isfinite(times).all()
