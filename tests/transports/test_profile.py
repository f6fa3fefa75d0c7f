"""`edgeadapt profile` over every transport: the device has Python, numpy and ONNX Runtime, and nothing of edgeadapt."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgeadapt.device import read_device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import profile
from tests.transports.conftest import Target

SMALL = {"threads": 1, "prompt_tokens": 8, "new_tokens": 4, "repeats": 2, "attempts": 1}


def _helper(root: Path, name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, root / "tests" / "unit" / "runtime" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def bundle(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with adapters a and b."""
    tiny, bundles = (_helper(root, name) for name in ("tiny_graphs", "tiny_bundles"))
    path: Path = tmp_path_factory.mktemp("profile") / "a decoder.bundle"
    sites = tiny.decoder_sites(tiny.DecoderShape())
    bundles.write_decoder(path, {"a": tiny.low_rank(sites, 4, 11), "b": tiny.low_rank(sites, 2, 12)})
    bundles.record_goldens(path)
    return path


def _device(target: Target, **changes: object) -> object:
    return replace(target.device, runtime="onnxruntime", **changes)


@pytest.mark.parametrize("kind", ["local", "ssh", "adb", "simulated"])
def test_a_profile_over_a_transport(kind, request, bundle):
    target = request.getfixturevalue(kind)
    found = profile(bundle, device=_device(target), adapter="b", **SMALL)
    assert found.device.transport == kind
    assert found.runtime == "onnxruntime"
    assert found.failures == ()
    assert found.host.machine == os.uname().machine
    assert {name: len(found.samples[name]) for name in ("ttft_8_s", "latency_s")} == {"ttft_8_s": 2, "latency_s": 8}
    assert found.adapter_tax.adapter == "b"
    assert found.memory.peak_resident_bytes > 10e6
    assert {check.adapter for check in found.checks} == {None, "a", "b"}
    assert max(check.relative_error for check in found.checks) < 1e-4
    assert target.left() == []


def test_answers_of_an_emulated_processor(emulated, bundle, monkeypatch):
    """The shipped device file: its answers are compared, its times are nobody's."""
    monkeypatch.setenv("EDGEADAPT_ARM64_SYSROOT", emulated.device.address)
    device = read_device("arm64-emulated")
    found = profile(bundle, device=device, adapter="a", **SMALL)
    assert found.emulated
    assert (found.latency_p50_s, found.load_time_s, found.memory) == (None, None, None)
    assert {check.adapter for check in found.checks} == {None, "a", "b"}
    errors = np.asarray([check.relative_error for check in found.checks])
    assert np.all(errors < 1e-4)
    assert emulated.left() == []


def test_what_was_measured_before_the_device_was_lost_is_kept(simulated, bundle):
    found = profile(bundle, device=_device(simulated, address="run:2:lost"), **SMALL)
    assert len(found.samples["latency_s"]) == 8
    assert len(found.failures) > 0
    assert all("was lost" in failure for failure in found.failures)
    assert simulated.left() == []


def test_the_command_line_measures_over_ssh(ssh, bundle, tmp_path):
    """By a device file of one's own; stdout is one JSON document."""
    here = os.uname().machine
    path = tmp_path / "my-pi.toml"
    path.write_text(
        f'title = "a Pi"\nprovider = "cpu"\nruntime = "onnxruntime"\nmachine = "{here}"\n'
        f'transport = "ssh"\naddress = "device"\ninterpreter = "{sys.executable}"\nsources = []\n'
    )
    command = [sys.executable, "-m", "edgeadapt", "profile", str(bundle), "--device", str(path), "--json"]
    sizes = ["--threads", "1", "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "2"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["device"]["name"], found["device"]["transport"]) == ("my-pi", "ssh")
    assert found["host"]["machine"] == here
    assert found["failures"] == []
    assert ssh.left() == []
    path.write_text(path.read_text().replace(here, "riscv64"))
    refused = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "device 'my-pi' is an riscv64 machine, and my-pi (device) is " in " ".join(refused.stderr.split())


def test_a_runtime_that_the_device_lacks_is_named(ssh, bundle, tmp_path):
    """Its Python has numpy and no ONNX Runtime."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "onnxruntime.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'onnxruntime'\", name='onnxruntime')\n"
    )
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH="{hidden}" exec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    with pytest.raises(ProfileError) as caught:
        profile(bundle, device=_device(ssh, interpreter=str(wrapper)), **SMALL)
    assert "onnxruntime" in caught.value.message
    assert caught.value.hint == "on the device: pip install onnxruntime numpy"
    assert ssh.left() == []
