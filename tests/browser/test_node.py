"""ONNX Runtime in a real Node.js."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.runtimes import node as runtime
from edgeadapt.profiling.transports import connect

DEVICE = Device("here", "this machine", "cpu", runtime="node", threads=1)
pytestmark = pytest.mark.usefixtures("node")


def measured(job, what):
    with connect(DEVICE) as transport:
        return runtime.measure(job, transport, 300, what)


@pytest.mark.parametrize(("bits", "tolerance"), [(None, 1e-5), (8, 0.02), (4, 0.02)])
def test_a_decoder_answers_as_numpy_does_and_every_sample_is_there(decoder_job, samples_are_whole, bits, tolerance):
    found = measured(decoder_job(runtime, DEVICE, bits=bits), "speed")
    samples_are_whole(found)
    assert [row["adapter"] for row in found["checks"]] == [None, "a", "b"]
    assert all(row["relative_error"] < tolerance for row in found["checks"])
    assert len(found["swap"]["from_disk_s"]) == len(found["swap"]["resident_s"])
    assert found["engine_version"] == found["host"]["versions"]["onnxruntime_node"]
    assert found["process_start_s"] > 0
    assert found["noise"]["seconds"] > 0


def test_a_single_pass_answers_as_numpy_does_for_each_row(pass_job):
    found = measured(pass_job(runtime, DEVICE, active="a"), "speed")
    assert [row["adapter"] for row in found["checks"]] == [None, "a"]
    assert all(row["relative_error"] < 1e-5 and row["same_top1"] for row in found["checks"])
    assert len(found["latency_s"]) == 20
    assert "ttft_s" not in found


def test_an_adapter_that_is_not_applied_would_be_seen(decoder_job):
    """The goldens of the base and of the adapters differ by more than any tolerance above."""
    job = decoder_job(runtime, DEVICE)
    file = job / "job.json"
    changed = json.loads(file.read_text())
    changed["adapters"]["a"] = changed["adapters"]["b"]
    file.write_text(json.dumps(changed))
    rows = {row["adapter"]: row["relative_error"] for row in measured(job, "checks")["checks"]}
    assert rows["a"] > 0.1
    assert rows["b"] < 1e-5


def test_memory_is_that_of_the_process_after_each_stage(decoder_job):
    found = measured(decoder_job(runtime, DEVICE), "memory")["memory"]
    stages = [found["before_load"], found["after_load"], found["after_run"], *found["further_adapters"].values()]
    assert list(found["further_adapters"]) == ["a", "b"]
    assert all(10**7 < stage["resident_bytes"] <= stage["peak_resident_bytes"] < 10**9 for stage in stages)
    peaks = [stage["peak_resident_bytes"] for stage in stages]
    assert peaks == sorted(peaks)


def test_what_cannot_be_measured_is_null_with_a_note(pass_job):
    job = pass_job(runtime, DEVICE)
    assert measured(job, "operators")["operators"] is None
    cold = measured(job, "cold")
    assert cold["cold_load_time_s"] is None
    assert cold["notes"][-1] == "a cold load was not measured: a script cannot ask the system to forget files"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"provider": "cpu", "speed": 9}}, "unknown option speed of the engine onnxruntime_node"),
        ({"tax_adapter": "c"}, "the job has no adapter c"),
        ({"models": {"plain": "model/none.onnx"}}, "Error: Load model from model/none.onnx failed"),
    ],
)
def test_what_a_job_asks_for_wrongly_is_an_error(decoder_job, change, message):
    with pytest.raises(ProfileError) as caught:
        measured(decoder_job(runtime, DEVICE, **change), "speed")
    assert caught.value.message.startswith(message)


def test_a_damaged_tensor_file_is_an_error_that_names_it(decoder_job):
    job = decoder_job(runtime, DEVICE)
    file = job / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ProfileError, match=r"tensors\.safetensors is damaged: tensor .* lies outside of the file"):
        measured(job, "checks")


def test_a_missing_package_and_a_missing_node_say_how_to_get_them(decoder_job, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEADAPT_NODE_MODULES", str(tmp_path / "none"))
    with pytest.raises(ProfileError) as caught:
        runtime.require(DEVICE)
    assert caught.value.message == f"the npm package onnxruntime-node is not installed in {tmp_path / 'none'}"
    assert caught.value.hint == f"npm install --ignore-scripts --prefix '{tmp_path / 'none'}' onnxruntime-node@1.30.0"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProfileError, match="there is no program node here"):
        runtime.require(DEVICE)


def test_a_provider_that_node_has_not_is_refused():
    with pytest.raises(ProfileError, match="is measured on the CPU, not on 'cuda'"):
        runtime.require(Device("gpu", "gpu", "cuda"))


DAMAGES = {
    "empty": (lambda data: data[:7], "it is shorter than its own header"),
    "long header": (lambda data: (2**40).to_bytes(8, "little") + data[8:], "its header of 1099511627776 bytes"),
    "no JSON": (lambda data: data[:8] + b"[" + data[9:], "its header is not JSON"),
    "rest": (lambda data: data + b"\0", "its header says"),
    "dtype": (lambda data: data.replace(b'"F32"', b'"F99"'), "has the dtype F99; known are"),
    "gap": (lambda data: data.replace(b"[0,8]", b"[1,9]"), "lies outside of the file"),
    "shape": (lambda data: data.replace(b'"shape":[2]', b'"shape":[3]'), "has 8 bytes for the shape [3]"),
    "negative": (lambda data: data.replace(b'"shape":[2]', b'"shape":-2 '), "has no valid shape and data_offsets"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_reader_of_tensors_takes_nothing_on_trust(tmp_path, damage):
    change, message = DAMAGES[damage]
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    data = len(header).to_bytes(8, "little") + header + np.asarray([1.5, -2], np.float32).tobytes()
    assert _read(tmp_path, data) == {"x": ["float32", [2], [1.5, -2]]}
    assert message in _read(tmp_path, change(data))


def _read(folder, data):
    (folder / "x.safetensors").write_bytes(data)
    program = f"""
        import {{ parseTensors }} from {json.dumps(str(runtime._DEVICE_SIDE / "tensors.mjs"))};
        import {{ readFileSync }} from "node:fs";
        const bytes = new Uint8Array(readFileSync({json.dumps(str(folder / "x.safetensors"))}));
        let told;
        try {{
          const found = [...parseTensors(bytes, "x")].map(([name, t]) => [name, [t.type, t.dims, Array.from(t.data)]]);
          told = Object.fromEntries(found);
        }} catch (error) {{ told = error.message; }}
        console.log(JSON.stringify(told));
    """
    done = subprocess.run(
        [shutil.which("node"), "--input-type=module", "-e", program], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)
