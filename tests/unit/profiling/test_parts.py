from __future__ import annotations

import mmap
import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgeadapt.errors import ProfileError
from edgeadapt.profiling.device_side import runner, system
from edgeadapt.profiling.samples import paired_ratio, percentile
from edgeadapt.profiling.workload import Workload, example_inputs
from edgeadapt.runtime import open_session


def test_percentiles_of_known_samples():
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([1.0, 2.0], 75) == 1.75
    with pytest.raises(ValueError, match="there are no samples"):
        percentile([], 50)


def test_a_ratio_of_pairs_is_not_moved_by_drift():
    """Neighbouring samples share the machine's mood; a ratio of medians would see it."""
    assert paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0], [1.0, 2.0])


UNKNOWN = dict.fromkeys(
    ("resident_bytes", "peak_resident_bytes", "proportional_bytes", "anonymous_bytes", "file_bytes")
)


def test_memory_as_proc_tells_it(tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\n")
    assert system.memory_now(tmp_path) == UNKNOWN | {"resident_bytes": 204800, "peak_resident_bytes": 307200}
    (tmp_path / "smaps_rollup").write_text("55-7f ---p 00 00:00 0  [rollup]\nRss:  200 kB\nPss:   100 kB\n")
    with (tmp_path / "status").open("a") as file:
        file.write("RssAnon:\t  120 kB\nRssFile:\t  60 kB\nRssShmem:\t  20 kB\n")
    assert system.memory_now(tmp_path) == {
        "resident_bytes": 204800,
        "peak_resident_bytes": 307200,
        "proportional_bytes": 102400,
        "anonymous_bytes": 122880,
        "file_bytes": 81920,
    }
    assert system.memory_now(tmp_path / "none") == UNKNOWN


@pytest.mark.parametrize(
    ("answer", "held"),
    [
        ("echo '77, 300'; echo '78, 512'; echo '78, 100'", 612 * 2**20),
        ("echo '77, 300'", None),
        ("echo '78, [N/A]'", None),
        ("echo 'No devices were found'; exit 6", None),
        (":", None),
    ],
)
def test_memory_of_gpus_as_their_driver_tells_it(answer, held, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert system.gpu_memory_now(78) == held
    program.unlink()
    assert system.gpu_memory_now(78) is None


@pytest.mark.parametrize(
    ("gpus", "held"),
    [
        ([[(77, 300)], [(78, 512), (78, 100)]], 612),
        ([[(77, 300)]], None),
        ([[(78, 512)], [(78, None)]], None),
        (None, 9 * 2**20),
    ],
)
def test_memory_of_gpus_as_nvml_tells_it(gpus, held, tmp_path, monkeypatch):
    """Where NVML's Python interface is there it is asked first; where its library is not, nvidia-smi."""
    closed = []
    nvml = ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})

    def init():
        if gpus is None:
            raise nvml.NVMLError

    nvml.nvmlInit, nvml.nvmlShutdown = init, lambda: closed.append(True)
    nvml.nvmlDeviceGetCount = lambda: len(gpus)
    nvml.nvmlDeviceGetHandleByIndex = lambda place: gpus[place]
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda gpu: [
        SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu
    ]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '78, 9'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert system.gpu_memory_now(78) == held
    assert bool(closed) == (gpus is not None)


def test_memory_sees_what_is_allocated():
    before = system.memory_now()
    if before["resident_bytes"] is None:
        pytest.skip("memory is read from /proc")
    timeline = system.MemoryTimeline()
    # Pages of its own: an array could be put into memory that earlier tests have freed.
    with mmap.mmap(-1, 64_000_000) as block:
        block.write(b"x" * len(block))
        after = system.memory_now()
        seen = timeline.stop()
    assert after["resident_bytes"] - before["resident_bytes"] > 50_000_000
    assert after["anonymous_bytes"] + after["file_bytes"] == after["resident_bytes"]
    assert seen
    assert all(held > 1_000_000 for _, held in seen)


def _proc(folder, *, stat="cpu  10 0 10 70 0 0 0 10 5 5\ncpu0 1", cpuinfo="", pressure=None):
    (folder / "stat").write_text(stat)
    (folder / "cpuinfo").write_text(cpuinfo)
    (folder / "meminfo").write_text("MemTotal:       1000 kB\nMemFree: 1 kB\n")
    if pressure is not None:
        (folder / "pressure").mkdir(exist_ok=True)
        line = f"some avg10=1.00 avg60=3.00 avg300=1.00 total={pressure}"
        (folder / "pressure" / "cpu").write_text(f"{line}\nfull x=1\n")
    return folder


def test_noise_is_counted_from_when_the_meter_is_made(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(system, "monotonic", lambda: clock[0])
    proc = _proc(tmp_path, pressure=1_000_000)
    meter = system.NoiseMeter(proc)
    clock[0] += 4
    _proc(tmp_path, stat="cpu  60 0 20 90 0 0 0 30 9 9\n", pressure=2_000_000)
    noise = meter.read()
    assert noise["seconds"] == 4
    assert noise["steal_ratio"] == 0.2  # 20 of 100 ticks
    assert noise["waiting_ratio"] == 0.25
    assert noise["others_ratio"] <= 0.6  # 60 of 100 ticks were busy, some with this process
    assert noise["involuntary_switches"] >= 0


def test_what_the_system_does_not_say_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(system.shutil, "which", lambda _: None)
    noise = system.NoiseMeter(tmp_path).read()
    assert (noise["steal_ratio"], noise["waiting_ratio"], noise["others_ratio"]) == (None, None, None)
    facts = system.host_facts(tmp_path)
    assert (facts["memory_bytes"], facts["gpu"]) == (None, None)
    assert set(system.SystemMeter(tmp_path).read().values()) == {None}
    assert system.bytes_read_from_storage(tmp_path) is None


def test_energy_clock_and_temperature_as_sysfs_tells_them(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("class/powercap/intel-rapl:0/energy_uj", "1000000\n")
    write("class/powercap/intel-rapl:0:0/energy_uj", "999\n")  # a part of the package, counted in it
    write("class/thermal/thermal_zone0/temp", "41000\n")
    write("class/thermal/thermal_zone1/temp", "39000\n")
    write("devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1500000\n")
    meter = system.SystemMeter(tmp_path)
    write("class/powercap/intel-rapl:0/energy_uj", "3500000\n")
    write("class/thermal/thermal_zone1/temp", "52000\n")
    write("devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "2400000\n")
    assert meter.read() == {
        "energy_j": 2.5,
        "clock_hz_min": 1.5e9,
        "clock_hz_max": 2.4e9,
        "temperature_c_start": 41.0,
        "temperature_c_end": 52.0,
    }
    write("class/powercap/intel-rapl:0/energy_uj", "7\n")
    assert meter.read()["energy_j"] is None  # it began anew


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor : 0\nmodel name\t: Fast CPU\nmodel name\t: other\n", "Fast CPU"),
        (
            "CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\nModel\t: Raspberry Pi 5\n",
            "Raspberry Pi 5, implementer 0x41, part 0xd0b",
        ),
    ],
)
def test_the_cpus_name(tmp_path, cpuinfo, name):
    facts = system.host_facts(_proc(tmp_path, cpuinfo=cpuinfo))
    assert facts["cpu"] == name
    assert facts["memory_bytes"] == 1024000
    assert facts["cores"] == len(os.sched_getaffinity(0))


def test_tensors_are_read_without_a_library(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "ids": np.asarray([[1, 2]], np.int64),
        "codes": np.asarray([-1, 5], np.int8),
        "none": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "t.safetensors")
    found = runner.read_tensors(tmp_path / "t.safetensors")
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        assert np.array_equal(found[name], value)
        assert found[name].dtype == value.dtype


def test_texts_are_as_long_as_asked_or_as_the_model_takes(classifier):
    with open_session(classifier, threads=1) as session:
        for wanted, length in ((5, 5), (500, 12)):
            inputs = example_inputs(session, "model", Workload((wanted,), 1, 1, batch_size=3))
            assert {name: value.shape for name, value in inputs.items()} == {
                "input_ids": (3, length),
                "attention_mask": (3, length),
            }
            assert inputs["attention_mask"].all()


def test_an_axis_of_unknown_length_is_refused_unless_a_golden_knows_it(classifier, monkeypatch):
    with open_session(classifier, threads=1) as session:
        from edgeadapt.runtime.ort import TensorInfo

        odd = {"input_ids": TensorInfo("input_ids", np.dtype(np.int64), ("batch", "frames"))}
        monkeypatch.setattr(type(session), "inputs", lambda *_: odd)
        golden = session.bundle.golden("a")
        found = example_inputs(session, "model", Workload((4,), 1, 1))
        assert found["input_ids"].tobytes() == golden.inputs["input_ids"].tobytes()
        odd["noise"] = TensorInfo("noise", np.dtype(np.float32), ("batch", None))
        with pytest.raises(ProfileError) as caught:
            example_inputs(session, "model", Workload((4,), 1, 1))
    assert str(caught.value) == (
        "the length of axis 'frames' of the model's input is not known, and no golden says it\n"
        "Hint: add an adapter (its golden holds an input), or export with axes named batch, seq, height, width"
    )


class Watched:
    """An engine that notes what was active, and answers with zeros."""

    def __init__(self):
        self.seen = []

    def open(self):
        self.seen.append("open")

    def use(self, adapter):
        self.seen.append(adapter)

    def start(self, ids, capacity):
        assert capacity == ids.shape[1] + 2
        return np.zeros((len(ids), 7), np.float32)

    def step(self, ids):
        assert ids.shape == (1, 1)
        return np.zeros((1, 7), np.float32)


@pytest.mark.parametrize("active", [None, "a"])
def test_tax_and_swap_leave_the_main_adapter_active(active):
    engine = Watched()
    job = {
        "decoder": {"vocab_size": 7},
        "workload": {"prompt_tokens": [4, 9], "new_tokens": 2, "repeats": 1, "batch_size": 1, "swaps": 1},
        "inputs": {},
        "checks": [],
        "adapters": {"a": {}, "b": {}},
        "active": active,
        "tax_adapter": "b",
    }
    found = {}
    runner.measure_speed(engine, job, {}, found)
    assert engine.seen[:2] == ["open", active]
    assert engine.seen[2:9] == [None, "b", None, "b", "b", None, active]  # warm-up, two pairs in turned order, restored
    assert engine.seen[-1] == active
    assert {name: len(taken) for name, taken in found["ttft_s"].items()} == {"4": 1, "9": 1}
    assert len(found["latency_s"]) == 2
    assert len(found["tax"]["base_s"]) == len(found["tax"]["active_s"]) == 2
    assert (found["tax"]["idle_s"], found["swap"]["from_disk_s"], found["swap"]["blend_s"]) == (None, None, None)


@pytest.mark.parametrize(("got", "same"), [([[1.0, 2.0]], True), ([[2.0, 1.0]], False)])
def test_a_gap_is_relative_to_the_largest_expected_value(got, same):
    wanted = np.asarray([[1.0, 4.0]])
    row = runner._gap([(wanted, wanted), (np.asarray(got), wanted)])
    largest = max(abs(np.asarray(got) - wanted)[0])
    assert row == {"max_abs_error": largest, "relative_error": largest / 4, "same_top1": same}
    with pytest.raises(ValueError, match="NaN"):
        runner._gap([(np.asarray([[np.nan, 1.0]]), wanted)])
    with pytest.raises(ValueError, match="the runtime gave"):
        runner._gap([(wanted[:, :1], wanted)])


def written(path, size):
    path.write_bytes(os.urandom(size))
    return path


def fetched_for(path):
    before = system.bytes_read_from_storage()
    path.read_bytes()
    return system.bytes_read_from_storage() - before


@pytest.fixture
def disk(tmp_path):
    """Return a folder on a disk from which bytes have to be fetched again."""
    path = written(tmp_path / "synced", 1 << 20)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    if not system.forget_file_cache([path]) or fetched_for(path) < 1 << 20:
        pytest.skip("files lie in memory here")
    return tmp_path


def test_a_file_that_was_written_just_now_is_forgotten(disk):
    path = written(disk / "new", 1 << 20)
    assert system.forget_file_cache([path])
    assert fetched_for(path) >= 1 << 20


@pytest.mark.parametrize(("active", "measured"), [(None, True), ("sql", False)])
def test_a_cold_load_is_one_of_all_files_that_are_opened(disk, active, measured, monkeypatch):
    (disk / "model").mkdir()
    files = {form: written(disk / "model" / form, size) for form, size in (("plain", 1 << 20), ("slots", 3 << 20))}
    monkeypatch.chdir(disk)
    engine = SimpleNamespace(open=files["plain"].read_bytes, use=lambda _: None)
    job = {"options": {}, "active": active, "models": {form: f"model/{form}" for form in files}}
    found = {"notes": []}
    runner.measure_cold(engine, job, {}, found)
    assert (found["cold_load_time_s"] is not None) is measured
    assert (found["notes"] == []) is measured
