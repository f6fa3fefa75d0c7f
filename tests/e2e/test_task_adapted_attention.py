"""Task-Adapted Attention: one file for many tasks on Swin, from export to swap, against the authors' form in torch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors
from torch import nn

from edgeadapt.adapters import describe, read_adapters
from edgeadapt.addition import verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.errors import AdapterError, MergeError
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e import research
from tests.parity import Parity

TOLERANCE = 1e-4
SMALLEST_EFFECT = 5e-3
BLOCKS = "swin.encoder.layers.0.blocks"
SIZE = 64  # of a task's embedding; a window of 4 x 4 tokens has 4 blocks of 4 columns
TASKS = ("depth", "edges")
Made = tuple[Path, dict[str | None, np.ndarray]]


def swin(window: int = 4) -> Any:
    """Return a tiny Swin of one stage: a block whose windows are where they are, and one whose windows are shifted."""
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=window, num_labels=4
    )
    return research.randomized(transformers.SwinForImageClassification(config), 1, scale=0.1)


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, 3, 16, 16)).astype(np.float32)


def tune(model: Any, folder: Path, *, blocks: list[int], tasks: tuple[str, ...], norms: bool, head: bool) -> list[Any]:
    """Put the adapter into `model` and save it; return a model for each task."""
    embeddings = research.randomized(nn.Embedding(len(tasks), SIZE), 2, scale=0.2)
    tensors = {"task_type_embeddings.weight": embeddings.weight}
    made: list[Any] = []
    config: dict[str, Any] = {"edgeadapt_type": "task_adapted_attention", "modules": [], "tasks": list(tasks)}
    config |= {"norms": [], "modules_to_save": ["classifier"] if head else []}
    for index in blocks:
        places = {"modules": (f"{BLOCKS}.{index}.attention.self", research.TaskAttention)}
        if norms:
            places["norms"] = (f"{BLOCKS}.{index}.layernorm_{'before' if index else 'after'}", research.TaskNorm)
        for key, (path, kind) in places.items():
            research.replace(model, path, lambda inner, kind=kind: kind(inner, SIZE))
            adapter = model.get_submodule(path)
            own = {name: value for name, value in adapter.named_parameters() if not name.startswith("inner.")}
            for seed, value in enumerate(own.values()):
                noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed + index))
                value.data.add_(0.3 * noise)
            tensors |= {f"{path}.{name}": value for name, value in own.items()}
            config[key].append(path)
            made.append(adapter)
    if head:
        research.randomized(model.classifier, 9)
        tensors |= {f"classifier.{name}": value for name, value in model.classifier.state_dict().items()}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_tensors(
        {key: value.detach().clone().contiguous() for key, value in tensors.items()}, folder / "adapter.safetensors"
    )
    models = []
    for task in range(len(tasks)):
        for adapter in made:
            adapter.embedding = embeddings.weight[task].detach()
        models.append(copy.deepcopy(model).eval())
    return models


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a folder with a base, adapters and a bundle of them, and what torch answers with each."""
    folder = tmp_path_factory.mktemp("task_adapted")
    model = swin()
    model.save_pretrained(folder / "base")
    models = {None: model}
    both = tune(copy.deepcopy(model), folder / "dense", blocks=[0, 1], tasks=TASKS, norms=True, head=False)
    models |= {f"dense-{task}": module for task, module in zip(TASKS, both, strict=True)}
    (models["late"],) = tune(
        copy.deepcopy(model), folder / "late", blocks=[1], tasks=("normals",), norms=False, head=True
    )
    base = str(folder / "base")
    export_bundle(Recipe((folder / "dense", folder / "late"), base, folder / "t.bundle", quantize="none"))
    with torch.no_grad():
        expected = {name: module(torch.from_numpy(pictures(3))).logits.numpy() for name, module in models.items()}
    return folder, expected


def test_every_task_equals_the_authors_form_and_goes_without_a_trace(made: Made, parity: Parity) -> None:
    folder, expected = made
    found: dict[str | None, set[bytes]] = {name: set() for name in expected}
    given = {"pixel_values": pictures(3)}
    with open_session(folder / "t.bundle") as session:
        for name in (None, "dense-depth", "dense-edges", "dense-depth", None, "late", "dense-edges", "late"):
            session.use(name)
            logits = session.run(given)["logits"]
            found[name].add(logits.tobytes())
            error = float(np.abs(logits - expected[name]).max() / np.abs(expected[name]).max())
            assert error <= TOLERANCE, name
            if name is not None:
                parity.add(
                    *(folder / name.partition("-")[0], "swin"),
                    source=research.SOURCE,
                    adapter=f"Task-Adapted-Attention-{name}",
                    errors={"swapped": error},
                )
                assert np.abs(expected[name] - expected[None]).max() >= SMALLEST_EFFECT * np.abs(expected[None]).max()
    assert [len(runs) for runs in found.values()] == [1, 1, 1, 1]
    assert np.abs(expected["dense-depth"] - expected["dense-edges"]).max() >= SMALLEST_EFFECT
    bundle = open_bundle(folder / "t.bundle")
    record = bundle.manifest.graphs["model"]
    plain, slots = (
        onnxruntime.InferenceSession(bundle.file(file), providers=["CPUExecutionProvider"])
        .run(None, given)[0]
        .tobytes()
        for file in (record.plain, record.slots)
    )
    assert plain == slots == found[None].pop()
    assert {(slot.site, slot.settings["tokens"]) for slot in bundle.manifest.branches} == {
        (f"{BLOCKS}.{index}.attention.output.dense", 16) for index in (0, 1)
    }
    assert bundle.manifest.parity["max_relative_error"] <= TOLERANCE
    assert verify_bundle(folder / "t.bundle") == []


def test_inspect_tells_what_it_is(made: Made) -> None:
    adapters = read_adapters(made[0] / "dense")
    assert [adapter.name for adapter in adapters] == ["dense-depth", "dense-edges"]
    facts = describe(adapters[1])
    assert facts["tokens_of_a_window"] == {"min": 16, "max": 16}
    assert facts["tasks"] == list(TASKS)
    assert facts["merge"]["exact"] is False


_SELF = f"{BLOCKS}.0.attention.self"
WRONG = {
    "missing": (f"{_SELF}.taa_attn.gb_weights.bias", None, "is missing in"),
    "extra": ("layers.0.adapter_layer.0.down_proj_layer.weight", np.ones((2, 2), np.float32), "is no part of a"),
    "columns": (f"{_SELF}.random_weight_matrix", np.ones((16, 5), np.float32), "need [16, 4]"),
    "film": (f"{_SELF}.taa_attn.gb_weights.weight", np.ones((8, 63), np.float32), "need [8, 64]"),
    "tasks": ("task_type_embeddings.weight", np.ones((3, SIZE), np.float32), "need [2, 64]"),
    "norm": (f"{BLOCKS}.0.layernorm_after.weight", np.ones(15, np.float32), "need [16]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_damaged_files_are_refused_by_name(case: str, made: Made, tmp_path: Path) -> None:
    key, value, message = WRONG[case]
    tensors = load_file(made[0] / "dense" / "adapter.safetensors")
    tensors.pop(key, None)
    tensors |= {} if value is None else {key: value}
    caught = refused(made, tmp_path, tensors, {}, AdapterError)
    assert key in caught
    assert message in caught


SETTINGS = {
    "tasks": ({"tasks": ["depth", "depth"]}, "tasks is ['depth', 'depth'], must be a list of the tasks' names"),
    "embedding": ({"tasks": ["depth"]}, "'task_type_embeddings.weight' has the shape [2, 64]"),
    "module": ({"modules": [f"{BLOCKS}.0.attention"]}, f"'{BLOCKS}.0.attention' of modules is no attention of Swin's"),
    "twice": (
        {"modules_to_save": [f"{BLOCKS}.0.layernorm_after"]},
        f"'{BLOCKS}.0.layernorm_after' is in norms and in modules_to_save",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_do_not_fit_are_refused(case: str, made: Made, tmp_path: Path) -> None:
    changes, message = SETTINGS[case]
    tensors = load_file(made[0] / "dense" / "adapter.safetensors")
    assert message in refused(made, tmp_path, tensors, changes, AdapterError)


def test_another_window_is_refused(made: Made, tmp_path: Path) -> None:
    swin(window=2).save_pretrained(tmp_path / "base")
    tensors = load_file(made[0] / "dense" / "adapter.safetensors")
    assert refused(made, tmp_path, tensors, {}, MergeError, base=tmp_path / "base") == (
        f"task_adapted_attention: a window of {_SELF} has 4 tokens, the adapter is for 16"
    )


def test_vmt_adapter_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Nothing tells what it computes, so it is refused before its tensors are looked at."""
    config = {"edgeadapt_type": "vmt_adapter", "modules": ["swin"], "tasks": ["depth"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"swin.down.weight": np.ones((2, 2), np.float32)}, tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterError) as caught:
        read_adapters(tmp_path)
    assert (
        "edgeadapt_type 'vmt_adapter' cannot be exported: VMT-Adapter (arXiv 2312.08733) has no" in caught.value.message
    )
    assert caught.value.hint == "train one parallel bottleneck per task (AdapterHub's par_bn): a bundle swaps them"


def refused(
    made: Made,
    tmp_path: Path,
    tensors: dict[str, np.ndarray],
    changes: dict[str, Any],
    error: type[AdapterError | MergeError],
    base: Path | None = None,
) -> str:
    """Return why an adapter that is not as it should be is refused; nothing is written."""
    config = json.loads((made[0] / "dense" / "adapter_config.json").read_text())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, tmp_path / "x" / "adapter.safetensors")
    with pytest.raises(error) as caught:
        export_bundle(
            Recipe((tmp_path / "x",), str(base or made[0] / "base"), tmp_path / "out.bundle", quantize="none")
        )
    assert {path.name for path in tmp_path.iterdir()} <= {"x", "base"}
    return caught.value.message
