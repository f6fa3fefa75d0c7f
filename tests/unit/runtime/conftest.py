"""Tiny bundles for the runtime's tests; made once a session."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def load_helper(name: str) -> ModuleType:
    """Import a helper that lies beside this file, under its own name (tests are not a package)."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


tiny = load_helper("tiny_graphs")
bundles = load_helper("tiny_bundles")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(path, shape, weights, adapters) of a decoder's bundle with adapters a (rank 4) and b (rank 2)."""
    path = tmp_path_factory.mktemp("decoder") / "tiny.bundle"
    sites = tiny.decoder_sites(tiny.DecoderShape())
    adapters = {"a": tiny.low_rank(sites, 4, 11), "b": tiny.low_rank(sites, 2, 12)}
    shape, weights = bundles.write_decoder(path, adapters)
    return path, shape, weights, adapters


@pytest.fixture(scope="session")
def chat_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder's bundle with a chat template and no end-of-sequence token that it could reach by chance."""
    path = tmp_path_factory.mktemp("chat") / "chat.bundle"
    bundles.write_decoder(path, {}, chat=True)
    return path


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(path, weights, adapters) of a text classifier's bundle with adapter a, whose labels are red, green, blue."""
    path = tmp_path_factory.mktemp("classifier") / "topics.bundle"
    adapters = {"a": tiny.low_rank({"dense": (16, 16), "classifier": (3, 16)}, 4, 5, size=1.0)}
    weights = bundles.write_classifier(path, adapters, adapter_labels=("red", "green", "blue"))
    return path, weights, adapters


@pytest.fixture(scope="session")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(path, adapters) of a sequence-to-sequence bundle whose adapter a acts in both graphs."""
    path = tmp_path_factory.mktemp("seq2seq") / "sum.bundle"
    adapters = {"a": tiny.low_rank({"enc": (8, 8), "head": (300, 8)}, 2, 9, size=1.0)}
    bundles.write_seq2seq(path, adapters)
    return path, adapters
