"""ST-Adapter: a tower of pictures that sees clips, from export to swap, against the paper's form in torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from edgeadapt.addition import verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.errors import AdapterError
from edgeadapt.merging.load import base_from_module
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e import research
from tests.e2e.tiny import IMAGE
from tests.parity import Parity

FRAMES = 4
LAYERS = "tower.vision_model.encoder.layers"
TOLERANCE = 1e-4
SMALLEST_EFFECT = 5e-3


def clips(count: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, FRAMES, 3, 32, 32)).astype(np.float32)


def tune(model: Any, folder: Path, *, layers: list[int], width: int, kernel: int, pre_attn: bool) -> None:
    """Put ST-Adapters into layers as the authors do, and save them."""
    parts = {}
    for index in layers:
        path = f"{LAYERS}.{index}"
        made = {
            f"adapter_{place}": research.randomized(
                research.StAdapter(64, width, FRAMES, kernel), 10 * index + len(place), scale=0.2
            )
            for place in (("pre_attn", "pre_mlp") if pre_attn else ("pre_mlp",))
        }
        parts[path] = nn.ModuleDict(made)
        research.replace(
            model,
            path,
            lambda layer, made=made: research.StLayer(layer, made.get("adapter_pre_attn"), made["adapter_pre_mlp"]),
        )
    research.save(
        folder,
        "st_adapter",
        parts,
        whole={"classifier": research.randomized(model.classifier, width)},
        frames=FRAMES,
        pre_attn=pre_attn,
    )


def test_it_equals_the_paper_and_goes_without_a_trace(tmp_path: Path, parity: Parity) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**IMAGE, projection_dim=32)
    model = research.Clips(research.randomized(transformers.CLIPVisionModel(config), 1, scale=0.05), FRAMES, 3).eval()
    inputs = torch.from_numpy(clips(2))
    tuned = {"everywhere": copy.deepcopy(model), "late": copy.deepcopy(model)}
    tune(tuned["everywhere"], tmp_path / "everywhere", layers=[0, 1], width=8, kernel=3, pre_attn=True)
    tune(tuned["late"], tmp_path / "late", layers=[1], width=4, kernel=5, pre_attn=False)
    base = base_from_module(
        model,
        name="clips",
        example_inputs={"clips": inputs},
        dynamic_axes={"clips": {0: "batch"}},
        output_names=("logits",),
    )
    output = tmp_path / "out.bundle"

    export_bundle(Recipe(tuple(tmp_path / name for name in tuned), None, output, quantize="none"), base=base)

    given = clips(3)
    with torch.no_grad():
        expected = {name: module(torch.from_numpy(given)).numpy() for name, module in {None: model, **tuned}.items()}
    found: dict[str | None, set[bytes]] = {name: set() for name in expected}
    with open_session(output) as session:
        for name in (None, "everywhere", "late", "everywhere", None, "late"):
            session.use(name)
            logits = session.run({"clips": given})["logits"]
            found[name].add(logits.tobytes())
            error = float(np.abs(logits - expected[name]).max() / np.abs(expected[name]).max())
            assert error <= TOLERANCE
            if name is not None:
                parity.add(
                    *(tmp_path / name, "clip (clips of 4 frames)"),
                    source=research.SOURCE,
                    adapter=f"ST-Adapter-{name}",
                    errors={"swapped": error},
                )
                effect = np.abs(expected[name] - expected[None]).max()
                assert effect >= SMALLEST_EFFECT * np.abs(expected[None]).max()
    assert [len(runs) for runs in found.values()] == [1, 1, 1]
    manifest = open_bundle(output).manifest
    assert {(slot.site.removeprefix("tower.vision_model."), slot.settings["reads"]) for slot in manifest.branches} == {
        ("pre_layrnorm", "output"),
        ("encoder.layers.0.self_attn.out_proj", "sum"),
        ("encoder.layers.0.mlp.fc2", "sum"),
        ("encoder.layers.1.self_attn.out_proj", "sum"),
    }
    assert manifest.parity["max_relative_error"] <= TOLERANCE
    assert verify_bundle(output) == []


def test_a_layer_of_another_model_is_refused(tmp_path: Path) -> None:
    """Another layer than of CLIP or a ViT has no place for it."""
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    research.save(
        tmp_path / "x",
        "st_adapter",
        {"0": nn.ModuleDict({"adapter_pre_mlp": research.StAdapter(4, 2, FRAMES)})},
        frames=FRAMES,
        pre_attn=False,
    )
    base = base_from_module(
        model, name="plain", example_inputs={"input": torch.zeros(2, 4)}, dynamic_axes={"input": {0: "batch"}}
    )
    with pytest.raises(AdapterError) as caught:
        export_bundle(Recipe((tmp_path / "x",), None, tmp_path / "x.bundle", quantize="none"), base=base)
    assert str(caught.value) == (
        "adapter 'x': '0' is no layer of CLIP's image tower or of a ViT in base 'plain'\n"
        "Hint: modules names layers, such as vision_model.encoder.layers.0"
    )
