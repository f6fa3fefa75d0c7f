"""A small bundle whose graphs are only bytes: nothing in this layer runs them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate, TargetModule
from edgeadapt.bundle.base import base_fingerprint, base_modules
from edgeadapt.bundle.bind import bind
from edgeadapt.bundle.bundle import Bundle, open_bundle
from edgeadapt.bundle.golden import Golden, make_golden
from edgeadapt.bundle.manifest import SCHEMA, AdapterRecord, BaseRecord, Manifest
from edgeadapt.bundle.write import write_adapter, write_assets, write_manifest
from edgeadapt.files import staged_directory
from edgeadapt.slots import GraphRecord, ParameterSlot, Slot

MODULES = {
    path: TargetModule(path, kind, kind.title(), shape, ins, outs, bias, hashlib.sha256(path.encode()).hexdigest())
    for path, kind, shape, ins, outs, bias in (
        ("layer.q", "linear", (6, 4), 4, 6, True),
        ("layer.c", "conv1d", (4, 5), 4, 5, True),
        ("layer.conv", "conv2d", (8, 2, 3, 3), 2, 8, False),
        ("embed", "embedding", (10, 4), 10, 4, False),
        ("norm", "norm", (4,), 4, 4, True),
        ("other", "linear", (3, 3), 3, 3, False),
        ("classifier", "linear", (2, 4), 4, 2, True),
    )
}


def _slot(site: str, *terms: str) -> Slot:
    module = MODULES[site]
    inputs = {term: f"{site}.{ {'a': 'lora_A', 'b': 'lora_B'}.get(term, term) }" for term in terms}
    return Slot(site, ("model",), module.type, module.in_features, module.out_features, inputs)


@pytest.fixture(scope="session")
def modules() -> dict[str, TargetModule]:
    return MODULES


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """Of a bundle without adapters, before `write_manifest`."""
    return Manifest(
        schema=SCHEMA,
        name="toy",
        task="text-classification",
        base=BaseRecord("toy/base", None, "toy", None, base_fingerprint(MODULES), base_modules(MODULES)),
        graphs={"model": GraphRecord("graph/model.plain.onnx", "graph/model.slots.onnx", ("input_ids",), ("logits",))},
        slots=(
            _slot("layer.q", "a", "b", "gain", "offset"),
            _slot("layer.c", "a", "b", "input_gain"),
            _slot("layer.conv", "a", "b", "gain"),
            _slot("embed", "a", "b"),
            _slot("norm", "gain", "offset"),
        ),
        parameters=(
            ParameterSlot("classifier.weight", ("model",), "classifier.weight", ("num_labels", 4)),
            ParameterSlot("classifier.bias", ("model",), "classifier.bias", ("num_labels",)),
        ),
        adapter_dtype="float16",
        merged=None,
        adapters={},
        quantization={"scheme": "int8"},
        parity={},
        quality=(),
        files={},
        runtime={"onnxruntime": ">=1.24.3"},
        labels=("no", "yes"),
    )


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., ResolvedAdapter]:
    """Make an adapter that touches every kind of slot."""

    def make(name: str = "one", *, seed: int = 0, rank: int = 3, labels: int = 2) -> ResolvedAdapter:
        random = np.random.default_rng(seed)

        def array(*shape: int) -> np.ndarray:
            return random.normal(size=shape).astype(np.float32)

        sites = {
            "layer.q": SiteUpdate(array(4, rank), array(rank, 6), array(6), array(6)),
            "layer.c": SiteUpdate(array(4, rank + 1), array(rank + 1, 5), input_gain=array(4)),
            "layer.conv": SiteUpdate(array(rank, 2, 3, 3), array(8, rank, 1, 1), array(8)),
            "embed": SiteUpdate(array(10, rank), array(rank, 4)),
            "norm": SiteUpdate(gain=array(4), offset=array(4)),
        }
        replaced = {"classifier.weight": array(labels, 4), "classifier.bias": array(labels)}
        return ResolvedAdapter(name, "lora", sites, replaced)

    return make


@pytest.fixture(scope="session")
def golden() -> Golden:
    inputs = {"input_ids": np.arange(4)[None]}
    base = {"logits": np.array([[1.0, -2.0]], np.float32)}
    adapted = {"logits": np.array([[1.5, -2.0]], np.float32)}
    return make_golden("one", inputs, base, adapted, tolerance=1e-3, smallest_effect=1e-6)


@pytest.fixture(scope="session")
def record() -> AdapterRecord:
    return AdapterRecord("lora", 3, 100, 1.0, 1.0, "stamp")


@pytest.fixture
def make_bundle(tmp_path, manifest, make_adapter, golden, record) -> Callable[..., Bundle]:
    """Write a bundle with the adapters named."""

    def make(*names: str, target: Path = tmp_path / "toy.bundle", **changes) -> Bundle:
        with staged_directory(target, force=True) as folder:
            (folder / "graph").mkdir()
            for file in ("model.plain.onnx", "model.slots.onnx", "weights.bin"):
                (folder / "graph" / file).write_bytes(file.encode() * 100)
            write_assets(folder, {"config.json": b"{}\n", "tokenizer.json": b'{"version": "1.0"}'})
            records = {}
            for seed, name in enumerate(names):
                tensors = bind(make_adapter(name, seed=seed), manifest)
                fingerprint = manifest.base.fingerprint
                records[name] = write_adapter(
                    folder, name, tensors, record, golden, "float16", base_fingerprint=fingerprint
                )
            write_manifest(folder, dataclasses.replace(manifest, adapters=records, **changes))
        return open_bundle(target)

    return make
