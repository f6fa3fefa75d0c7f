"""Tip-Adapter on CLIP: exported, swapped, and given more examples in the bundle, against the paper's form in torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from edgeadapt.addition import verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.enrolment import enroll
from edgeadapt.errors import BundleError, MergeError
from edgeadapt.merging.load import base_from_module
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e import research
from tests.e2e.tiny import IMAGE
from tests.parity import Parity

TOLERANCE = 1e-4
CLASSES = 3


@dataclass(frozen=True)
class Made:
    """A zero-shot CLIP, two caches of examples of it in torch, and their bundle."""

    model: Any
    caches: dict[str, research.TipAdapter]
    bundle: Path


def pictures(seed: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


def features(model: Any, images: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model.features(torch.from_numpy(images))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**{**IMAGE, "num_hidden_layers": 1}, projection_dim=32)
    tower = research.randomized(transformers.CLIPVisionModelWithProjection(config), 1, scale=0.1)
    model = research.ZeroShotClip(tower, torch.randn(CLASSES, 32)).eval()
    folder = tmp_path_factory.mktemp("tip")
    caches = {}
    for name, alpha, beta, classes in (("few", 20.0, 5.5, [0, 2]), ("many", 60.0, 2.0, [0, 0, 1, 1, 2])):
        cache = research.TipAdapter(model.classifier, alpha, beta)
        cache.enroll(features(model, pictures(len(classes), len(classes))), classes)
        (folder / name).mkdir()
        save_file(
            {"classifier.keys": cache.keys, "classifier.values": cache.values}, folder / name / "adapter.safetensors"
        )
        config = {"edgeadapt_type": "tip_adapter", "modules": ["classifier"], "alpha": alpha, "beta": beta}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        caches[name] = cache
    base = base_from_module(
        model,
        name="zero-shot",
        example_inputs={"pixel_values": torch.from_numpy(pictures(0))},
        dynamic_axes={"pixel_values": {0: "batch"}},
        output_names=("logits",),
    )
    bundle = folder / "out.bundle"
    export_bundle(Recipe(tuple(folder / name for name in caches), None, bundle, quantize="none"), base=base)
    return Made(model, caches, bundle)


@pytest.fixture
def own(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.bundle, tmp_path / "own.bundle"))


def off(expected: torch.Tensor, found: np.ndarray) -> float:
    return float(np.abs(expected.numpy() - found).max() / expected.abs().max())


def test_swapped_it_equals_the_paper(made: Made, parity: Parity) -> None:
    images = pictures(11, 4)
    read = features(made.model, images)
    found: dict[str | None, set[bytes]] = {None: set(), "few": set(), "many": set()}
    with open_session(made.bundle) as session:
        for name in (None, "few", "many", "few", None, "many"):
            session.use(name)
            outputs = session.run({"pixel_values": images})
            assert set(outputs) == {"logits"}  # the features that rows are made of are no answer
            found[name].add(outputs["logits"].tobytes())
            with torch.no_grad():
                expected = (made.caches[name] if name else made.model.classifier)(read)
            error = off(expected, outputs["logits"])
            assert error <= TOLERANCE
            if name is not None:
                parity.add(
                    *(made.bundle.parent / name, "clip (zero-shot)"),
                    source=research.SOURCE,
                    adapter="Tip-Adapter",
                    errors={"swapped": error},
                )
    assert [len(runs) for runs in found.values()] == [1, 1, 1]
    assert open_bundle(made.bundle).manifest.parity["max_relative_error"] <= TOLERANCE
    assert verify_bundle(made.bundle) == []


def test_examples_are_appended_without_torch(made: Made, own: Path, tmp_path: Path, parity: Parity) -> None:
    """By the command line, in a process that never imports torch."""
    np.savez(tmp_path / "more.npz", pixel_values=pictures(7, 3))
    code = (
        "import sys\nfrom edgeadapt.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'peft', 'onnx_ir'} & set(sys.modules)\n"
    )
    arguments = ["enroll", own, "few", "--class", "1", "--inputs", tmp_path / "more.npz", "--quiet"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, timeout=120)
    cache = research.TipAdapter(made.model.classifier, 20.0, 5.5)
    cache.enroll(features(made.model, pictures(2, 2)), [0, 2])
    cache.enroll(features(made.model, pictures(7, 3)), [1, 1, 1])
    images = pictures(12, 4)
    with open_session(own) as session, open_session(made.bundle) as before:
        session.use("few")
        with torch.no_grad():
            error = off(cache(features(made.model, images)), session.run({"pixel_values": images})["logits"])
        assert error <= TOLERANCE
        parity.add(
            *(made.bundle.parent / "few", "clip (zero-shot)"),
            source=research.SOURCE,
            adapter="Tip-Adapter-enrolled",
            errors={"swapped": error},
        )
        for name in (None, "many"):
            session.use(name)
            before.use(name)
            one, other = (each.run({"pixel_values": images})["logits"] for each in (session, before))
            assert one.tobytes() == other.tobytes()
    old, new = (open_bundle(path).manifest.adapters["few"] for path in (made.bundle, own))
    assert new.parameters == old.parameters + 3 * (32 + CLASSES)
    assert verify_bundle(own) == []


def test_an_adapter_of_examples_alone(made: Made, own: Path) -> None:
    enroll(own, "fresh", {"pixel_values": pictures(21, 2)}, [2, 0], alpha=30.0)
    enroll(own, "fresh", {"pixel_values": pictures(22, 1)}, [1])
    cache = research.TipAdapter(made.model.classifier, 30.0, 5.5)
    cache.enroll(features(made.model, np.concatenate([pictures(21, 2), pictures(22, 1)])), [2, 0, 1])
    images = pictures(13, 4)
    with open_session(own) as session:
        session.use("fresh")
        with torch.no_grad():
            found = session.run({"pixel_values": images})["logits"]
            assert off(cache(features(made.model, images)), found) <= TOLERANCE
    assert verify_bundle(own) == []


def test_a_folder_is_added_without_torch(made: Made, own: Path) -> None:
    code = (
        "import sys\nfrom edgeadapt.addition import add_adapter\n"
        "add_adapter(sys.argv[1], sys.argv[2], name='again')\n"
        "assert not {'torch', 'transformers', 'peft', 'onnx_ir'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(own), str(made.bundle.parent / "many")], check=True, timeout=120)
    images = pictures(14)
    with open_session(own) as session:
        found = []
        for name in ("many", "again"):
            session.use(name)
            found.append(session.run({"pixel_values": images})["logits"].tobytes())
    assert found[0] == found[1]
    assert verify_bundle(own) == []


def test_merging_and_blending_are_refused(made: Made, tmp_path: Path) -> None:
    folder = made.bundle.parent / "few"
    base = base_from_module(
        made.model,
        name="zero-shot",
        example_inputs={"pixel_values": torch.from_numpy(pictures(0))},
        dynamic_axes={"pixel_values": {0: "batch"}},
    )
    with pytest.raises(MergeError) as merged:
        export_bundle(Recipe((folder,), None, tmp_path / "x.bundle", quantize="none", merge=True), base=base)
    assert merged.value.message == (
        "adapter 'few' cannot be merged: it has networks of its own (cache beside 'classifier' first), which fold into "
        "no weight"
    )
    with open_session(made.bundle) as session, pytest.raises(BundleError) as blended:
        session.use({"few": 0.5, "many": 0.5})
    assert blended.value.message == (
        "an adapter of the blend has a network of its own beside module 'classifier', which has no weighted form"
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda path: enroll(path, "few", {"pixel_values": pictures(1, 1)}, [3]), "there is no class 3"),
        (lambda path: enroll(path, "few", {"pixel_values": pictures(1, 1)}, ["cat"]), "there is no class 'cat'"),
        (
            lambda path: enroll(path, "few", {"pixel_values": pictures(1, 1)}, [0, 1]),
            "1 examples and 2 classes were given for adapter 'few'",
        ),
    ],
)
def test_what_is_refused_leaves_the_bundle_as_it_was(
    act: Callable[[Path], Any], message: str, own: Path, made: Made
) -> None:
    with pytest.raises(BundleError) as caught:
        act(own)
    assert caught.value.message == message
    assert (own / "manifest.json").read_bytes() == (made.bundle / "manifest.json").read_bytes()
