"""Bundles on runtimes that read no ONNX: converted, run, and compared with the bundle's own goldens."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgeadapt.device import read_device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import Profile, profile
from edgeadapt.profiling.runtimes import coreml, executorch, litert
from edgeadapt.profiling.runtimes._convert import Runtime

Exported = Callable[..., Path]

MEASURED = {"litert": litert.RUNTIME, "executorch": executorch.RUNTIME}
CASES = [
    *(("litert", *case) for case in (("llama", "none", 1e-5), ("bert", "int8", 0.05), ("resnet", "none", 1e-5))),
    *(("executorch", *case) for case in (("llama", "none", 1e-5), ("bert", "int8", 0.05))),
]
"""Few: a converter takes a minute for each."""
TORCH = [
    *((model, "none", 1e-5) for model in ("llama", "bert", "resnet")),
    *((model, "int8", 0.05) for model in ("llama", "bert", "resnet")),
]
"""Of 8 bits ONNX Runtime rounds activations too, which torch does not."""


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


def _measured(bundle: Path, runtime: str) -> Profile:
    return profile(bundle, runtime=runtime, threads=1, prompt_tokens=6, new_tokens=3, repeats=1, attempts=1)


@pytest.mark.parametrize(("runtime", "model", "scheme", "tolerance"), CASES)
def test_answers_like_the_bundle(exported: Exported, runtime: str, model: str, scheme: str, tolerance: float) -> None:
    _need(MEASURED[runtime])
    bundle = exported(model, quantize=scheme)
    found = _measured(bundle, runtime)
    assert not found.failures
    assert {check.adapter for check in found.checks} == {None, "adapter0", "adapter1"}
    gaps = {str(check.adapter): check.relative_error for check in found.checks}
    assert max(gaps.values()) < tolerance, gaps
    assert found.adapter_tax is not None
    assert len(found.samples["tax_idle_s"]) == len(found.samples["tax_active_s"]) > 0


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
