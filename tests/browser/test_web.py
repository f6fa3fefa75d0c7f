"""ONNX Runtime Web in a real Chromium without a window."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError, UnfinishedError
from edgeadapt.profiling import profile
from edgeadapt.profiling.runtimes import web as runtime
from edgeadapt.profiling.web import chromium as browsers
from edgeadapt.profiling.web.memory import PageMemory, processes_below

WASM = Device("browser", "this machine's browser", "wasm", runtime="web", threads=2)
NODE = Device("node", "this machine's Node.js", "cpu", runtime="node", threads=1)
WEBGPU = Device("browser", "this machine's browser", "webgpu", runtime="web", threads=1)
pytestmark = pytest.mark.usefixtures("chromium")


@pytest.mark.parametrize(("bits", "tolerance"), [(None, 1e-5), (8, 1e-5), (4, 1e-5)])
def test_a_decoder_answers_as_numpy_does_and_every_sample_is_there(decoder_job, samples_are_whole, bits, tolerance):
    found = runtime.measure_in_browser(decoder_job(runtime, WASM, bits=bits), "speed", 300)
    samples_are_whole(found)
    assert [row["adapter"] for row in found["checks"]] == [None, "a", "b"]
    assert all(row["relative_error"] < tolerance for row in found["checks"])
    assert found["threads"] == 2
    assert found["swap"]["from_disk_s"] is None
    assert found["host"]["versions"]["browser"].startswith("Chromium ")
    assert found["host"]["cores"] == len(os.sched_getaffinity(0))
    assert found["noise"]["involuntary_switches"] is None
    assert "starting ONNX Runtime took" in found["notes"][-2]
    assert "MB took" in found["notes"][-1]
    told = [note for note in found["notes"] if "with weights in codes were unpacked" in note]
    assert [note.split(" ", 1)[0] for note in told] == ([] if bits is None else ["13"])
    assert not any("anew in every run" in note for note in found["notes"])


def test_products_that_cannot_be_unpacked_are_told_and_their_answers_are_right(decoder_job, monkeypatch):
    monkeypatch.setattr(runtime, "_MOST_UNPACKED", 10)
    found = runtime.measure_in_browser(decoder_job(runtime, WASM, bits=8), "checks", 300)
    assert all(row["relative_error"] < 1e-5 for row in found["checks"])
    (note,) = (note for note in found["notes"] if "anew in every run" in note)
    assert note.startswith("13 products")


def test_webgpu_keeps_products_in_codes(decoder_job):
    job = decoder_job(runtime, WEBGPU, bits=8)
    assert b"MatMulNBits" in (job / "model" / "decoder.plain.onnx").read_bytes()
    assert "extra" not in json.loads((job / "job.json").read_text())["options"]


def test_a_single_pass_answers_as_numpy_does_for_each_row(pass_job):
    found = runtime.measure_in_browser(pass_job(runtime, WASM, active="a"), "speed", 300)
    assert [row["adapter"] for row in found["checks"]] == [None, "a"]
    assert all(row["relative_error"] < 1e-5 and row["same_top1"] for row in found["checks"])
    assert len(found["latency_s"]) == 20


def test_webgpu_answers_as_numpy_does_and_says_that_it_is_software(decoder_job, samples_are_whole):
    found = runtime.measure_in_browser(decoder_job(runtime, WEBGPU), "speed", 300)
    samples_are_whole(found)
    assert all(row["relative_error"] < 1e-3 for row in found["checks"])
    if not browsers.has_gpu():
        assert found["host"]["gpu"] == "google swiftshader"
        assert any("its latency means nothing" in note for note in found["notes"])


def test_memory_is_what_the_page_takes_beyond_an_empty_one(decoder_job):
    found = runtime.measure_in_browser(decoder_job(runtime, WASM), "memory", 300)["memory"]
    stages = [found["before_load"], found["after_load"], found["after_run"], *found["further_adapters"].values()]
    assert list(found["further_adapters"]) == ["a", "b"]
    assert all(10**6 < stage["resident_bytes"] <= stage["peak_resident_bytes"] < 10**9 for stage in stages)
    peaks = [stage["peak_resident_bytes"] for stage in stages]
    assert peaks == sorted(peaks)


def test_a_browser_that_dies_and_a_page_that_dies_are_errors_that_keep_what_was_measured(decoder_job, monkeypatch):
    job = decoder_job(runtime, WASM, workload=_endless())
    for victim, message in (
        ("browser", "the browser was killed by signal 9 before"),
        ("renderer", "the browser went away"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "Chromium", _killed(victim))
            with pytest.raises(ProfileError) as caught:
                runtime.measure_in_browser(job, "speed", 300)
        assert caught.value.message.startswith(message)
        if isinstance(caught.value, UnfinishedError):
            assert caught.value.partial["load_time_s"] > 0
            assert caught.value.partial["partial"] == caught.value.message


def test_time_is_limited_and_what_was_measured_is_kept(decoder_job):
    job = decoder_job(runtime, WASM, workload=_endless())
    for limit in (15, 90):  # a busy machine may not come to the first sample in the shorter time
        with pytest.raises(UnfinishedError) as caught:
            runtime.measure_in_browser(job, "speed", limit)
        assert caught.value.message.startswith(f"the browser was not done within {limit} s (")
        if "schema" in caught.value.partial:
            break
    assert caught.value.partial["schema"] == "edgeadapt.samples/1"


def test_no_process_and_no_folder_is_left(monkeypatch):
    place = Path(tempfile.mkdtemp())  # pytest's own is too long for a socket of the browser's
    monkeypatch.setattr(browsers.tempfile, "tempdir", str(place))
    with browsers.Chromium("about:blank") as browser:
        end = time.monotonic() + 60
        while not any(kind == "renderer" for _, kind in processes_below(browser.pid)):
            browser.check()
            assert time.monotonic() < end
            time.sleep(0.1)
        pids = [browser.pid, *(pid for pid, _ in processes_below(browser.pid))]
        assert len(list(place.iterdir())) == 1
    assert len(pids) > 2
    place.rmdir()
    assert not [pid for pid in pids if _runs(pid)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 9}, "unknown option speed of the engine onnxruntime_web"),
        ({"external_data": ["model/none.bin"]}, "job/model/none.bin cannot be fetched: 404 Not Found"),
        ({"external_data": []}, "Error: "),
    ],
)
def test_what_goes_wrong_in_the_page_is_told_here(decoder_job, options, message):
    job = decoder_job(runtime, WASM)
    file = job / "job.json"
    changed = json.loads(file.read_text())
    changed["options"] |= options
    file.write_text(json.dumps(changed))
    with pytest.raises(UnfinishedError) as caught:
        runtime.measure_in_browser(job, "speed", 300)
    assert caught.value.message.startswith(message)


def test_a_missing_browser_and_a_missing_package_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProfileError) as caught:
        runtime.require(WASM)
    assert caught.value.message == "no Chromium or Chrome was found"
    assert caught.value.hint == browsers.INSTALL
    monkeypatch.setenv("EDGEADAPT_BROWSER", "lynx")
    with pytest.raises(ProfileError, match="EDGEADAPT_BROWSER names lynx, which is no program"):
        runtime.require(WASM)
    monkeypatch.setenv("EDGEADAPT_BROWSER", "/bin/true")
    monkeypatch.setenv("EDGEADAPT_NODE_MODULES", str(tmp_path))
    with pytest.raises(ProfileError) as caught:
        runtime.require(WASM)
    assert caught.value.hint == f"npm install --ignore-scripts --prefix '{tmp_path}' onnxruntime-web@1.30.0"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (Device("x", "x", "cpu"), "ONNX Runtime Web does not run on 'cpu'"),
        (Device("x", "x", "wasm", transport="ssh"), "no browser can be started on 'x', which is reached by ssh"),
    ],
)
def test_devices_that_are_no_browser_here_are_refused(device, message):
    with pytest.raises(ProfileError) as caught:
        runtime.require(device)
    assert caught.value.message == message


def test_memory_follows_the_page_that_grew_and_with_webgpu_the_process_of_the_gpu(tmp_path):
    def process(pid, parent, kind, rss, peak):
        folder = tmp_path / str(pid)
        folder.mkdir(exist_ok=True)
        (folder / "stat").write_text(f"{pid} (a (b) c) S {parent} 1 1 0")
        (folder / "cmdline").write_bytes(f"/usr/bin/chromium\0--type={kind}\0--x\0".encode())
        (folder / "status").write_text(f"VmHWM: {peak} kB\nVmRSS: {rss} kB\nRssAnon: {rss} kB\nRssFile: 0 kB\n")

    def all_of(page, other, gpu):
        process(1, 0, "init", 9, 9)
        process(10, 1, "browser", 500, 500)
        process(11, 10, "zygote", 50, 50)
        process(12, 11, "renderer", *page)
        process(13, 11, "renderer", *other)
        process(14, 10, "gpu-process", *gpu)
        process(20, 1, "renderer", 9000, 9000)  # of another browser

    all_of((100, 120), (200, 200), (40, 40))
    plain, with_gpu = (PageMemory(10, gpu=gpu, proc=tmp_path) for gpu in (False, True))
    assert plain()["resident_bytes"] == with_gpu()["resident_bytes"] == 0
    all_of((400, 450), (210, 220), (140, 160))
    assert plain()["resident_bytes"] == 300 * 1024
    assert plain()["peak_resident_bytes"] == 350 * 1024
    assert plain()["proportional_bytes"] is None
    assert with_gpu()["resident_bytes"] == 400 * 1024
    assert PageMemory(77, gpu=False, proc=tmp_path)() is None


@pytest.mark.parametrize(("device", "engine"), [(WASM, "onnxruntime_web"), (NODE, "onnxruntime_node")])
def test_a_profile_of_a_bundle_has_every_figure(decoder_bundle, device, engine):
    found = profile(decoder_bundle, device=device, prompt_tokens=(5, 9), new_tokens=4, repeats=2, attempts=1)
    assert [row.adapter for row in found.checks] == [None, "a", "b"]
    assert all(row.relative_error < 1e-5 for row in found.checks)
    assert found.failures == ()
    assert found.host.versions[engine] == "1.30.0"
    assert found.adapter_tax.adapter == found.swap.adapter == "a"
    assert found.memory.run_resident_bytes > 10**6
    assert len(found.samples["latency_s"]) == 8


def _endless():
    return {"prompt_tokens": [5], "new_tokens": 3, "repeats": 10**6, "batch_size": 1, "swaps": 1}


def _killed(victim):
    """Return Chromium that loses its own process, or those of its pages, some seconds after its start."""

    class Killed(browsers.Chromium):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            threading.Timer(12, self._kill).start()

        def _kill(self):
            pages = [pid for pid, kind in processes_below(self.pid) if kind == "renderer"]
            for pid in [self.pid] if victim == "browser" else pages:
                os.kill(pid, signal.SIGKILL)

    return Killed


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - as short as it gets
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
