"""Bundles on runtimes that read no ONNX: converted, run, and compared with the bundle's own goldens."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edgeadapt.bundle import open_bundle
from edgeadapt.device import read_device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import Profile, device_side, profile
from edgeadapt.profiling.profile import prepared, read_workload
from edgeadapt.profiling.runtimes import coreml, executorch, litert
from edgeadapt.profiling.runtimes._convert import Runtime
from edgeadapt.progress import SILENT
from tests.e2e.conftest import Tiny

Exported = Callable[..., Path]

MEASURED = {"litert": litert.RUNTIME, "executorch": executorch.RUNTIME}
CASES = [
    *(("litert", *case) for case in (("llama", "none", 1e-5), ("bert", "int8", 0.05), ("resnet", "none", 1e-5))),
    ("executorch", "bert", "int8", 0.05),
]
"""Few: a converter takes a minute for each."""
TORCH = [
    *((model, "none", 1e-5) for model in ("llama", "bert", "resnet")),
    *((model, "int8", 0.05) for model in ("llama", "bert", "resnet")),
]
"""Of 8 bits ONNX Runtime rounds activations too, which torch does not."""

ANSWERS = """
import json
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from engines.executorch import Engine
from runner import read_tensors

job, tensors = json.loads(Path("job.json").read_text()), read_tensors(Path("tensors.safetensors"))
engine = Engine(".", job, tensors)
engine.open()
ids = tensors[job["checks"][0]["inputs"]["input_ids"]]
said = []
for adapter in (None, "adapter0", None, "adapter1", "adapter0", "evict", "adapter0"):
    if adapter == "evict":
        engine.evict("adapter0")
        continue
    engine.use(adapter)
    said.append(engine.start(ids, ids.shape[1]).tolist())
engine.close()
print(json.dumps(said))
"""
"""A program for ExecuTorch's Python, in a job's folder: what a text is answered with, adapters in turn."""


@dataclass(frozen=True)
class Programs:
    """A bundle as ExecuTorch reads it: the job's folder, the Python it was converted in, and the profile."""

    bundle: Path
    folder: Path
    python: str
    profile: Profile

    def size_bytes(self, name: str) -> int:
        return (self.folder / "model" / name).stat().st_size


@pytest.fixture(scope="module")
def programs(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Return tiny Llama for ExecuTorch, in float32."""
    _need(executorch.RUNTIME)
    bundle, kept = exported("llama", quantize="none"), tmp_path_factory.mktemp("executorch") / "job"
    named: dict[str, Any] = {"device": "cpu", "runtime": "executorch", "threads": 1, "adapter": None}
    with prepared(bundle, read_workload(6, 3, 1, 1), **named, timeout_s=None, announce=None, progress=SILENT) as run:
        shutil.copytree(run.folder / "job", kept)
        found = run.measure(operators=False, attempts=1, progress=SILENT)
    return Programs(bundle, kept, executorch.RUNTIME.python(run.device), found)


def _need(runtime: Runtime) -> None:
    here = all(importlib.util.find_spec(module) for module in runtime.modules)
    if not here and runtime.variable not in os.environ:
        pytest.skip(f"{runtime.install}; or {runtime.variable}=PYTHON")


@pytest.mark.parametrize(("model", "scheme", "tolerance"), TORCH)
def test_torch_answers_like_the_bundle(exported: Exported, model: str, scheme: str, tolerance: float) -> None:
    found = _measured(exported(model, quantize=scheme), "torch")
    assert found.failures == ()
    gaps = {check.adapter: check.relative_error for check in found.checks}
    assert set(gaps) == {None, "adapter0", "adapter1"}
    assert 0 < max(gaps.values()) < tolerance, gaps
    assert found.adapter_tax is not None
    assert len(found.samples["tax_idle_s"]) == len(found.samples["tax_active_s"]) > 0
    assert found.swap is not None
    assert found.cold_load_time_s is None or found.cold_load_time_s > 0
    assert found.gpu_latency_p50_s is None  # of the CPU there is no such clock


def _measured(bundle: Path, runtime: str, models: Path | None = None) -> Profile:
    small: dict[str, Any] = {"threads": 1, "prompt_tokens": 6, "new_tokens": 3, "repeats": 1, "attempts": 1}
    return profile(bundle, runtime=runtime, models=models, **small)


@pytest.mark.parametrize(("runtime", "model", "scheme", "tolerance"), CASES)
def test_answers_like_the_bundle_and_is_converted_once(
    tiny: Callable[[str], Tiny],
    exported: Exported,
    runtime: str,
    model: str,
    scheme: str,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _need(MEASURED[runtime])
    few = {"adapters": tiny(model).adapters[:1]} if MEASURED[runtime].programs else {}  # each would be converted
    bundle, kept = exported(model, quantize=scheme, **few), tmp_path / "models"
    first = _measured(bundle, runtime, kept)
    _check_answers(first, tolerance, 1 if few else 2)

    def never(*_: Any) -> None:
        raise AssertionError("it was converted again")

    monkeypatch.setattr({"litert": litert, "executorch": executorch}[runtime], "prepare", never)
    again = _measured(bundle, runtime, kept)
    assert {check.adapter: check.relative_error for check in again.checks} == {
        check.adapter: check.relative_error for check in first.checks
    }
    assert (again.sizes, again.failures) == (first.sizes, ())


def _check_answers(found: Profile, tolerance: float, adapters: int = 2) -> None:
    assert not found.failures
    assert {check.adapter for check in found.checks} == {None, *("adapter0", "adapter1")[:adapters]}
    gaps = {str(check.adapter): check.relative_error for check in found.checks}
    assert max(gaps.values()) < tolerance, gaps
    assert found.adapter_tax is not None
    assert len(found.samples["tax_active_s"]) > 0
    # an adapter that is a program of its own leaves nothing in the base's
    idle = len(found.samples["tax_active_s"]) if found.runtime == "litert" else 0
    assert len(found.samples.get("tax_idle_s") or ()) == idle


def test_executorch_answers_like_the_bundle_and_tells_its_swaps(programs: Programs) -> None:
    _check_answers(programs.profile, 1e-5)
    swap, memory = programs.profile.swap, programs.profile.memory
    assert swap is not None
    assert swap.from_disk_s is not None
    assert swap.from_disk_s > swap.resident_s
    assert memory is not None
    assert set(memory.further_adapters_resident_bytes) == {"adapter0", "adapter1"}


def test_executorch_programs_share_the_bases_weights(programs: Programs) -> None:
    names = {"base.ptd", "plain.pte", "adapter.adapter0.pte", "adapter.adapter1.pte"}
    assert {path.name for path in (programs.folder / "model").iterdir()} == names
    bundle = open_bundle(programs.bundle)
    (graph,) = bundle.manifest.graphs.values()
    weights = bundle.file(graph.plain).parent / "weights.bin"
    # all of the base's weights are in the data file, and, beside code, nothing but the adapter's own in a program
    assert programs.size_bytes("base.ptd") > 0.9 * weights.stat().st_size
    code = programs.size_bytes("plain.pte")
    assert code < weights.stat().st_size / 2
    for name in ("adapter0", "adapter1"):
        own = sum(array.nbytes for array in bundle.graph_tensors(name).values())
        assert own < programs.size_bytes(f"adapter.{name}.pte") - code < own + code / 2
    assert any("base.ptd" in note and "adapter.adapter0.pte" in note for note in programs.profile.notes)


def test_executorch_swaps_change_the_answer_and_back(programs: Programs) -> None:
    command = [programs.python, "-c", ANSWERS, str(Path(device_side.__file__).parent)]
    done = subprocess.run(command, cwd=programs.folder, capture_output=True, text=True, check=True)
    base, first, base_again, second, first_again, first_reopened = json.loads(done.stdout.splitlines()[-1])
    assert base == base_again
    assert first == first_again == first_reopened
    assert base != first != second != base


def test_executorch_needs_the_bases_weights(programs: Programs, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    shutil.copytree(programs.folder, folder)
    (folder / "model" / "base.ptd").unlink()
    command = [programs.python, "-c", ANSWERS, str(Path(device_side.__file__).parent)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "base.ptd" in done.stderr


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("vit", r"converted, saved and opened again.*prediction: not measurable here"),
        ("llama", r"writes text, and Core ML's converter knows no operator 'alias'"),
    ],
)
def test_core_ml_converts_and_says_what_cannot_be_had(exported: Exported, model: str, said: str) -> None:
    _need(coreml.RUNTIME)
    with pytest.raises(ProfileError, match=said):
        _measured(exported(model, quantize="none"), "coreml")


@pytest.mark.parametrize("runtime", [*MEASURED, "coreml"])
def test_a_missing_converter_says_which_command_installs_it(
    exported: Exported, runtime: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.symlink_to(sys.executable)  # outside of its environment it finds no packages
    monkeypatch.setenv(f"EDGEADAPT_{runtime.upper()}_PYTHON", str(program))
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(ProfileError) as error:
        profile(exported("llama", quantize="none"), runtime=runtime)
    assert f"{program} has no " in error.value.message
    assert f"scripts/install-runtime {runtime}" in error.value.hint


def test_another_provider_is_refused() -> None:
    with pytest.raises(ProfileError, match="litert runs on the CPU here"):
        litert.require(replace(read_device("cpu"), provider="cuda"))
