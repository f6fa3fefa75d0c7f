"""torch beside the goldens on the CPU; of the GPU, all that can be known without one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch

from edgeadapt.bundle import open_bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import launch, profile
from edgeadapt.profiling.assemble import _on_gpu
from edgeadapt.profiling.device_side import runner, system
from edgeadapt.profiling.device_side.engines import torch_eager
from edgeadapt.profiling.job import Shapes, write_job
from edgeadapt.profiling.report import rows
from edgeadapt.profiling.runtimes import torch as runtime
from edgeadapt.profiling.workload import Workload
from edgeadapt.runtime import ort

SMALL = {"threads": 1, "prompt_tokens": 8, "new_tokens": 5, "repeats": 2, "attempts": 1}
HERE = Device("here", "this machine", "cpu", threads=1)
GPU = Device("gpu", "a GPU", "cuda", threads=1)
WORK = Workload((3, 8), 5, 2, 2)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")


@dataclass
class Job:
    folder: Path
    job: dict
    tensors: dict

    def engine(self):
        return torch_eager.Engine(str(self.folder), self.job, self.tensors)


@pytest.fixture
def job(tmp_path):
    def make(path, device=HERE):
        bundle = open_bundle(path)
        models = runtime.prepare(bundle, device, tmp_path, Shapes(2, 8, 13, WORK.prompt_tokens))
        wanted = write_job(tmp_path, bundle, models, WORK, engine=runtime.ENGINE, active=None, tax_adapter="a")
        return Job(tmp_path, wanted, runner.read_tensors(tmp_path / "tensors.safetensors"))

    return make


@pytest.mark.parametrize(("name", "adapters"), [("decoder", ["a", "b"]), ("classifier", ["a"])])
def test_its_answers_are_the_goldens(name, adapters, request):
    found = profile(request.getfixturevalue(name), runtime="torch", **SMALL)
    assert found.failures == ()
    assert [check.adapter for check in found.checks if check.output == "logits"] == [None, *adapters]
    assert all(check.relative_error < 1e-5 for check in found.checks)  # float32 in another order of summing
    assert found.runtime_version == torch.__version__
    assert found.adapter_tax.idle_ratio > 0
    assert found.swap.resident_s > 0
    assert found.memory.run_resident_bytes > found.memory.before_load_resident_bytes
    assert (found.memory.run_gpu_bytes, found.memory.run_gpu_allocator_bytes, found.gpu_latency_p50_s) == (None,) * 3
    assert not any("GPU" in row["figure"] for row in rows(found))


def test_another_provider_is_refused():
    with pytest.raises(ProfileError) as caught:
        runtime.require(Device("rt", "TensorRT", "tensorrt"))
    assert str(caught.value) == "torch does not run on 'tensorrt'\nHint: known: cpu, cuda"


def test_without_a_gpu_nothing_is_prepared(decoder, monkeypatch):
    monkeypatch.setattr(ort, "gpu_is_visible", lambda: False)
    with pytest.raises(ProfileError) as caught:
        profile(decoder, device="cuda", runtime="torch", **SMALL)
    assert str(caught.value) == (
        "torch on 'cuda' needs an NVIDIA GPU, and none can be seen (no /dev/nvidia*, no nvidia-smi)\n"
        "Hint: choose --device cpu, or a machine with a GPU and its driver"
    )


@without_gpu
def test_a_gpu_that_torch_does_not_see_is_no_cpu(decoder, monkeypatch):
    """The device's own answer, as a machine gives it whose driver or torch is the wrong one."""
    monkeypatch.setattr(ort, "gpu_is_visible", lambda: True)
    with pytest.raises(ProfileError) as caught:
        profile(decoder, device="cuda", runtime="torch", **SMALL)
    said = f"torch {torch.__version__} sees no CUDA device"
    if torch.version.cuda is None:
        assert str(caught.value) == (
            f"{said}: it was built without CUDA\nHint: install torch's build for CUDA "
            "(https://pytorch.org/get-started/locally), or choose --device cpu"
        )
    else:
        assert caught.value.message.startswith(f"{said}, and was built for CUDA {torch.version.cuda}")
        assert "nvidia-smi" in caught.value.hint


def test_what_is_missing_is_told_with_the_command_that_installs_it(decoder, monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", {"torch": 1}.get)
    with pytest.raises(ProfileError) as caught:
        profile(decoder, runtime="torch", **SMALL)
    hint = f"{runtime.INSTALL}; or name a Python that has it with --interpreter"
    assert str(caught.value) == f"onnx is not installed\nHint: {hint}"


def test_a_python_on_the_device_that_lacks_it_is_told(decoder, tmp_path):
    """Its Python has numpy, and neither torch nor onnx."""
    python = tmp_path / "python"
    numpy = Path(np.__file__).parents[1]
    hidden = f"import sys; sys.modules['torch'] = None; sys.path.append({str(numpy)!r})"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    python.write_text(f"#!/bin/sh\nPYTHONPATH='{tmp_path}' exec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    with pytest.raises(ProfileError) as caught:
        profile(decoder, runtime="torch", device=Device("h", "h", "cpu", interpreter=str(python)), **SMALL)
    assert str(caught.value) == f"torch is not installed\nHint: {runtime.INSTALL}"


def test_what_a_device_needs_is_sent_along():
    sent = set(launch.program_files(runtime.ENGINE, runtime.BESIDE))
    assert {"runner.py", "engines/torch_eager.py", "engines/_fixed.py", "convert/network.py"} <= sent
    assert not any(name.startswith("convert/") for name in launch.program_files("onnxruntime"))


def test_an_unknown_option_is_refused(decoder, job):
    made = job(decoder)
    made.job["options"]["precision"] = "bfloat16"
    with pytest.raises(ValueError, match="unknown option 'precision' of the engine torch_eager"):
        made.engine()


def test_every_network_runs_where_its_weights_are(decoder, job):
    """What an operator makes without saying where lies on the default device, here another one than the weights'."""
    engine = job(decoder).engine()
    engine.open()
    engine.use("b")
    networks = {(form, name): each for form, models in engine._models.items() for name, each in models.items()}
    assert {name for _, name in networks} == {"prefill_3", "prefill_8", "decode"}
    assert len(networks) == 6
    for network in networks.values():
        with torch.no_grad():
            wanted = network(*network.examples)
            with torch.device("meta"):
                found = network(*network.examples)
        assert all(torch.equal(here, there) for here, there in zip(found, wanted, strict=True))


def test_weights_adapters_and_cache_stay_where_they_are(decoder, job):
    engine = job(decoder).engine()
    engine.open()

    def weights(form):
        return {each.data_ptr(): each.nbytes for model in engine._models[form].values() for each in model.parameters()}

    plain = weights("plain")
    engine.use("a")
    both = plain | weights("slots")
    assert sum(both.values()) < 1.1 * sum(plain.values())  # the base is there once
    fed = engine._fed
    engine.use("b")
    assert {name: value.shape for name, value in engine._fed.items()} == {name: v.shape for name, v in fed.items()}
    engine.use("a")
    assert all(engine._fed[name] is value for name, value in fed.items())

    ids = np.arange(16).reshape(2, 8)
    first = engine.start(ids, 13)
    places = {name: value.data_ptr() for name, value in engine._cache.items()}
    for column in range(5):
        engine.step(ids[:, column : column + 1])
    assert np.array_equal(engine.start(ids, 13), first)
    assert {name: value.data_ptr() for name, value in engine._cache.items()} == places
    engine.close()


class WallEvent:
    """What an event of CUDA tells, by the wall's clock: on the CPU nothing is queued."""

    def __init__(self, *, enable_timing):
        assert enable_timing
        self._at = None

    def record(self):
        self._at = perf_counter()

    def elapsed_time(self, end):
        return (end._at - self._at) * 1e3  # as CUDA has it


@pytest.mark.parametrize("name", ["decoder", "classifier"])
def test_each_timed_run_has_its_time_on_the_gpus_clock(name, job, request, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "Event", WallEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    made = job(request.getfixturevalue(name))
    engine = made.engine()
    engine._clock = torch_eager._Clock()
    found = {}
    runner.measure_speed(engine, made.job, made.tensors, found)
    engine.close()
    assert waited
    shown = _on_gpu(found, WORK)
    walls = {"gpu_latency_s": found["latency_s"]}
    walls |= {f"gpu_ttft_{count}_s": taken for count, taken in found.get("ttft_s", {}).items()}
    assert set(shown) == set(walls)
    for key, wall in walls.items():
        assert len(shown[key]) == len(wall) > 0
        assert all(0 < inside < outside for inside, outside in zip(shown[key], wall, strict=True)), key


def test_a_gpus_times_are_sorted_by_what_ran():
    taken = [38.0, 33.0, 1.0, 2.0, 48.0, 43.0, 3.0, 4.0]  # the first length last: its text goes on
    found = _on_gpu({"gpu_s": taken, "ttft_s": {"3": [1, 1], "8": [1, 1]}}, Workload((3, 8), 2, 2, 1))
    assert found == {"gpu_latency_s": (1.0, 2.0, 3.0, 4.0), "gpu_ttft_8_s": (38.0, 48.0), "gpu_ttft_3_s": (33.0, 43.0)}
    assert _on_gpu({"gpu_s": [1.0, 2.0]}, Workload((8,), 1, 2, 1)) == {"gpu_latency_s": (1.0, 2.0)}
    assert _on_gpu({"gpu_s": []}, WORK) == {}


@pytest.mark.parametrize("held", [700, None])
def test_memory_of_the_gpu_is_the_drivers_and_beside_it_the_runtimes_own(held, decoder, job, monkeypatch):
    monkeypatch.setattr(system, "gpu_memory_now", lambda: held)
    made = job(decoder)
    engine = made.engine()
    monkeypatch.setattr(engine, "gpu_allocator_bytes", lambda: 500)
    made.job["options"]["provider"] = "cuda"
    found = {"notes": []}
    runner.measure_memory(engine, made.job, made.tensors, found)
    after = found["memory"]["after_run"]
    assert (after["gpu_bytes"], after["gpu_allocator_bytes"]) == (held, 500)
    assert found["notes"] == (
        [] if held else ["the GPU's driver does not say how much of its memory this process holds"]
    )
