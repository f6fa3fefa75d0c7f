"""The runtime tests' tiny bundles serve here too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _helper(name: str) -> ModuleType:
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "runtime" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


tiny = _helper("tiny_graphs")
bundles = _helper("tiny_bundles")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder's bundle with adapters a and b; its folder's name has a space."""
    path = tmp_path_factory.mktemp("profile") / "a decoder.bundle"
    sites = tiny.decoder_sites(tiny.DecoderShape())
    bundles.write_decoder(path, {"a": tiny.low_rank(sites, 4, 11), "b": tiny.low_rank(sites, 2, 12)})
    bundles.record_goldens(path)
    return path


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text classifier's bundle with adapter a."""
    path = tmp_path_factory.mktemp("profile") / "topics.bundle"
    bundles.write_classifier(path, {"a": tiny.low_rank({"dense": (16, 16), "classifier": (3, 16)}, 4, 5)})
    bundles.record_goldens(path)
    return path


@pytest.fixture(scope="session")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence-to-sequence bundle without adapters."""
    path = tmp_path_factory.mktemp("profile") / "sum.bundle"
    bundles.write_seq2seq(path, {})
    return path


@pytest.fixture
def helpers() -> Any:
    """The modules tiny_graphs and tiny_bundles."""
    return tiny, bundles
