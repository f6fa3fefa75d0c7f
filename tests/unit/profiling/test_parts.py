from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from edgeadapt.errors import ProfileError
from edgeadapt.profiling import host, memory
from edgeadapt.profiling.measure import measure_speed
from edgeadapt.profiling.samples import paired_ratio, percentile
from edgeadapt.profiling.workload import Workload, example_inputs, writer
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


def test_memory_as_proc_tells_it(tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\n")
    assert memory.memory_now(tmp_path) == memory.MemoryUse(204800, 307200, None)
    (tmp_path / "smaps_rollup").write_text("55-7f ---p 00 00:00 0  [rollup]\nRss:  200 kB\nPss:   100 kB\n")
    assert memory.memory_now(tmp_path) == memory.MemoryUse(204800, 307200, 102400)
    assert memory.memory_now(tmp_path / "none") == memory.MemoryUse(None, None, None)


def test_memory_sees_what_is_allocated():
    before = memory.memory_now()
    if before.resident_bytes is None:
        pytest.skip("memory is read from /proc")
    # Pages of its own: an array could be put into memory that earlier tests have freed.
    with mmap.mmap(-1, 64_000_000) as block:
        block.write(b"x" * len(block))
        after = memory.memory_now()
    assert after.resident_bytes - before.resident_bytes > 50_000_000


def _proc(folder, *, stat="cpu  10 0 10 70 0 0 0 10 5 5\ncpu0 1", cpuinfo="", pressure=None):
    (folder / "stat").write_text(stat)
    (folder / "cpuinfo").write_text(cpuinfo)
    (folder / "meminfo").write_text("MemTotal:       1000 kB\nMemFree: 1 kB\n")
    if pressure is not None:
        (folder / "pressure").mkdir()
        (folder / "pressure" / "cpu").write_text(pressure)
    return folder


def test_noise_is_counted_from_when_the_meter_is_made(tmp_path):
    proc = _proc(tmp_path, pressure="some avg10=12.50 avg60=3.00 avg300=1.00 total=1\nfull avg10=0.00\n")
    meter = host.NoiseMeter(proc)
    (proc / "stat").write_text("cpu  60 0 20 90 0 0 0 30 9 9\n")
    noise = meter.read()
    assert noise.steal_ratio == 0.2  # 20 of 100 ticks
    assert noise.cpu_pressure_percent == 12.5
    assert noise.involuntary_switches >= 0


def test_what_the_system_does_not_say_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(host.shutil, "which", lambda _: None)
    noise = host.NoiseMeter(tmp_path).read()
    assert (noise.steal_ratio, noise.cpu_pressure_percent) == (None, None)
    facts = host.host_facts("abacus", "1.0", tmp_path)
    assert (facts.memory_bytes, facts.gpu) == (None, None)
    assert facts.versions["abacus"] == "1.0"


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
    facts = host.host_facts("abacus", "1.0", _proc(tmp_path, cpuinfo=cpuinfo))
    assert facts.cpu == name
    assert facts.memory_bytes == 1024000
    assert facts.cores == len(os.sched_getaffinity(0))


def test_the_prompt_is_the_same_each_time_and_within_the_vocabulary(decoder):
    with open_session(decoder, threads=1) as session:
        work = writer(session, Workload(prompt_tokens=8, new_tokens=4, repeats=1, batch_size=2))
        cache, logits = work.start()
        assert (logits.shape, cache.lengths.tolist(), cache.max_length) == ((2, 1, 300), [8, 8], 12)
        again = work.start()[1]
        assert logits.tobytes() == again.tobytes()
        work.step(cache, logits)
        assert cache.lengths.tolist() == [9, 9]


def test_texts_are_as_long_as_asked_or_as_the_model_takes(classifier):
    with open_session(classifier, threads=1) as session:
        for wanted, length in ((5, 5), (500, 12)):
            inputs = example_inputs(session, "model", Workload(wanted, 1, 1, batch_size=3))
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
        found = example_inputs(session, "model", Workload(4, 1, 1))
        assert found["input_ids"].tobytes() == golden.inputs["input_ids"].tobytes()
        odd["noise"] = TensorInfo("noise", np.dtype(np.float32), ("batch", None))
        with pytest.raises(ProfileError) as caught:
            example_inputs(session, "model", Workload(4, 1, 1))
    assert str(caught.value) == (
        "the length of axis 'frames' of the model's input is not known, and no golden says it\n"
        "Hint: add an adapter (its golden holds an input), or export with axes named batch, seq, height, width"
    )


@pytest.mark.parametrize("active", [None, "a"])
def test_tax_and_swap_leave_the_main_adapter_active(decoder, active):
    seen = []

    def opened():
        session = open_session(decoder, threads=1)
        use = session.use

        def watched(adapter):
            seen.append(adapter)
            use(adapter)

        session.use = watched
        return session

    found = measure_speed(opened, Workload(4, 2, 1), active, "b")
    assert seen[0] == active
    assert seen[-1] == active
    assert seen[1:8] == [None, "b", None, "b", "b", None, active]  # warm-up, two pairs in turned order, restored
    assert len(found.tax_base_s) == len(found.tax_adapter_s) == 2
