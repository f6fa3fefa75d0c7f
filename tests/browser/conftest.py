"""Jobs of tiny bundles, in float32 and MatMulNBits, for ONNX Runtime in JavaScript."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgeadapt.errors import ProfileError
from edgeadapt.profiling.node_packages import find_package

ROOT = Path(__file__).parents[2]
# where scripts/install-web-tools puts the packages
os.environ.setdefault("EDGEADAPT_NODE_MODULES", str(ROOT / ".web-tools"))


def _helper(folder: Path, name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


tiny = _helper(ROOT / "tests" / "unit" / "runtime", "tiny_graphs")
bundles = _helper(ROOT / "tests" / "unit" / "runtime", "tiny_bundles")
jobs = _helper(Path(__file__).parent, "jobs")


def _need(package: str, program: str) -> None:
    try:
        find_package(package)
    except ProfileError:
        pytest.skip(f"{package} is not installed: scripts/install-web-tools could not fetch it")
    if shutil.which(program) is None:
        pytest.skip(f"there is no program {program}: scripts/install-web-tools could not install it")


@pytest.fixture
def node() -> None:
    """A Node.js with ONNX Runtime."""
    _need("onnxruntime-node", "node")


@pytest.fixture
def chromium() -> None:
    """A Chromium, and ONNX Runtime's web build."""
    _need("onnxruntime-web", "chromium")


@pytest.fixture
def decoder_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a decoder's job for a runtime: float32, or MatMulNBits of some bits."""

    def make(runtime: ModuleType, device: Any, *, bits: int | None = None, **changes: Any) -> Path:
        bundle = tmp_path / "a decoder.bundle"
        with monkeypatch.context() as patch:
            reference = jobs.decoder_bundle(bundle, tiny, bundles, bits, patch)
        jobs.write_decoder_job(tmp_path / "job", bundle, runtime, device, reference, **changes)
        return tmp_path / "job"

    return make


@pytest.fixture(scope="session")
def write_decoder_bundle() -> Callable[[Path], Path]:
    """Write a decoder's bundle with adapters a and b; its goldens are what edgeadapt's own session says."""

    def write(path: Path) -> Path:
        sites = tiny.decoder_sites(tiny.DecoderShape())
        bundles.write_decoder(path, {"a": tiny.low_rank(sites, 4, 11), "b": tiny.low_rank(sites, 2, 12)})
        bundles.record_goldens(path)
        return path

    return write


@pytest.fixture
def decoder_bundle(tmp_path: Path, write_decoder_bundle: Callable[[Path], Path]) -> Path:
    """A decoder's bundle with adapters a and b."""
    return write_decoder_bundle(tmp_path / "a decoder.bundle")


@pytest.fixture
def pass_job(tmp_path: Path) -> Callable[..., Path]:
    """Write a text classifier's job for a runtime."""

    def make(runtime: ModuleType, device: Any, **changes: Any) -> Path:
        bundle = tmp_path / "topics.bundle"
        adapter = tiny.low_rank({"dense": (16, 16), "classifier": (3, 16)}, 4, 5)
        weights = bundles.write_classifier(bundle, {"a": adapter})

        def reference(inputs: Any, name: str | None) -> Any:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            return bundles.classifier_reference(weights, ids, mask, adapter if name else {})

        jobs.write_pass_job(tmp_path / "job", bundle, runtime, device, reference, **changes)
        return tmp_path / "job"

    return make


@pytest.fixture
def samples_are_whole() -> Callable[[dict[str, Any]], None]:
    """Check that a decoder's samples are all there, in the numbers that the job asks for."""

    def check(found: dict[str, Any]) -> None:
        assert found["schema"] == "edgeadapt.samples/1"
        assert found["notes"][0] == "from the host"
        assert {count: len(values) for count, values in found["ttft_s"].items()} == {"5": 2, "2": 2}
        assert len(found["latency_s"]) == jobs.NEW * jobs.REPEATS
        tax = found["tax"]
        assert tax["adapter"] == "a"
        assert [len(tax[name]) for name in ("base_s", "active_s", "idle_s")] == [2 * jobs.REPEATS] * 3
        assert len(found["swap"]["resident_s"]) == jobs.SWAPS
        times = [found["load_time_s"], found["first_run_s"], *found["latency_s"], *found["ttft_s"]["5"], *tax["base_s"]]
        assert all(time > 0 for time in times)

    return check


@pytest.fixture(scope="session")
def devtools() -> ModuleType:
    """The module devtools."""
    return _helper(Path(__file__).parent, "devtools")


@pytest.fixture(scope="session")
def pocket(devtools: Any) -> Callable[..., Any]:
    """Make a phone's browser."""
    return devtools.Phone
