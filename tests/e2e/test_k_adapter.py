"""K-Adapter: networks beside a frozen encoder that read several of its layers, from export to swap."""

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
from transformers.models.bert.modeling_bert import BertEncoder

from edgeadapt.adapters import describe, read_adapters
from edgeadapt.addition import add_adapter, verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.errors import AdapterError, ExportError, MergeError
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e import research
from tests.e2e.tiny import DECODER, ENCODER
from tests.parity import Parity

TOLERANCE = 1e-4
SMALLEST_EFFECT = 5e-3
STATES = ["roberta.embeddings.LayerNorm", "roberta.encoder.layer.0.output.LayerNorm"]
LAST = "roberta.encoder.layer.1.output.LayerNorm"
HEADS = 4


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**ENCODER, type_vocab_size=1, pad_token_id=1)
    return research.randomized(transformers.RobertaForSequenceClassification(config), 1, scale=0.05)


def tune(
    model: Any, folder: Path, *, widths: list[int], states: list[int], join: bool = True, head: bool = False
) -> Any:
    """Put K-Adapters of some widths beside `model`, save them, and return it."""
    size, count = 64, len(widths)
    made = [
        research.randomized(
            research.KAdapter(size, width, places=len(states), layers=2, heads=HEADS), seed + width, scale=0.1
        )
        for seed, width in enumerate(widths)
    ]
    layers = [nn.Linear(2 * size, size) for _ in widths] + [nn.Linear(count * size, size)] * (count > 1) if join else []
    joined = [research.randomized(layer, index, scale=0.1) for index, layer in enumerate(layers)]
    model.roberta = research.KnowledgeEncoder(model.roberta, made, states, joined)
    names = ["factual", "linguistic"][:count] if count > 1 else [""]
    tensors = {
        ".".join(filter(None, (STATES[state], name, key))): value
        for name, adapter in zip(names, made, strict=True)
        for place, state in enumerate(states)
        for key, value in adapter.part(place).items()
    }
    layer_names = ["com_dense"] if count == 1 else [*(f"task_dense_{name}" for name in names), "task_dense"]
    for name, layer in zip(layer_names if join else [], joined, strict=True):
        tensors |= {f"{LAST}.{name}.{key}": value for key, value in layer.state_dict().items()}
    if head:
        research.randomized(model.classifier, 7)
        tensors |= {
            f"classifier.out_proj.{key}": value for key, value in model.classifier.out_proj.state_dict().items()
        }
        tensors |= {f"classifier.dense.{key}": value for key, value in model.classifier.dense.state_dict().items()}
    config: dict[str, Any] = {"edgeadapt_type": "k_adapter", "modules": [STATES[state] for state in states]}
    config |= {"last": LAST, "heads": HEADS}
    config |= {"modules_to_save": ["classifier.dense", "classifier.out_proj"]} if head else {}
    config |= {"knowledge": names} if count > 1 else {}
    config |= {} if join else {"fusion": "add"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_tensors(
        {key: value.detach().clone().contiguous() for key, value in tensors.items()}, folder / "adapter.safetensors"
    )
    return model.eval()


ADAPTERS: dict[str, dict[str, Any]] = {
    "factual": {"widths": [32], "states": [0, 1], "head": True},
    "linguistic": {"widths": [16], "states": [0, 1]},
    "both": {"widths": [32, 16], "states": [0, 1]},
    "added": {"widths": [8], "states": [1], "join": False},
}


def inputs() -> dict[str, np.ndarray]:
    """Return two texts, one of them filled up with padding, which an adapter's attention sees."""
    ids = np.random.default_rng(5).integers(3, 127, (2, 9))
    mask = np.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(**{name: torch.from_numpy(value) for name, value in inputs().items()}).logits.numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, np.ndarray]]:
    """Return a folder with a base, adapters and a bundle of three of them, and what torch answers with each."""
    folder = tmp_path_factory.mktemp("k_adapter")
    model = base()
    model.save_pretrained(folder / "base")
    expected: dict[str | None, np.ndarray] = {None: logits_of(model)}
    for name, options in ADAPTERS.items():
        expected[name] = logits_of(tune(copy.deepcopy(model), folder / name, **options))
    chosen = tuple(folder / name for name in ADAPTERS if name != "linguistic")
    export_bundle(Recipe(chosen, str(folder / "base"), folder / "k.bundle", quantize="none"))
    return folder, expected


def test_it_equals_the_paper_and_goes_without_a_trace(
    made: tuple[Path, dict[str | None, np.ndarray]], parity: Parity
) -> None:
    folder, expected = made
    bundle = folder / "k.bundle"
    add_adapter(bundle, folder / "linguistic")  # of another width: the graph takes it, without torch or base
    order = (None, "factual", "linguistic", "factual", None, "both", "added", "both", "linguistic", None)
    found: dict[str | None, set[bytes]] = {name: set() for name in order}
    with open_session(bundle) as session:
        for name in order:
            session.use(name)
            logits = session.run(inputs())["logits"]
            found[name].add(logits.tobytes())
            error = float(np.abs(logits - expected[name]).max() / np.abs(expected[name]).max())
            assert error <= TOLERANCE, name
            if name is not None:
                parity.add(
                    folder / name,
                    "roberta",
                    source=research.SOURCE,
                    adapter=f"K-Adapter-{name}",
                    errors={"swapped": error},
                )
                assert np.abs(expected[name] - expected[None]).max() >= SMALLEST_EFFECT * np.abs(expected[None]).max()
    assert all(len(runs) == 1 for runs in found.values())
    record = open_bundle(bundle).manifest.graphs["model"]
    plain, slots = (
        onnxruntime.InferenceSession(open_bundle(bundle).file(file), providers=["CPUExecutionProvider"])
        .run(None, inputs())[0]
        .tobytes()
        for file in (record.plain, record.slots)
    )
    assert plain == slots == found[None].pop()
    assert open_bundle(bundle).manifest.parity["max_relative_error"] <= TOLERANCE
    assert verify_bundle(bundle) == []


def test_adapters_of_one_shape_share_their_nodes(made: tuple[Path, dict[str | None, np.ndarray]]) -> None:
    """Two adapters of other widths have one slot; the second of a pair has another, as does one that is added."""
    slots = open_bundle(made[0] / "k.bundle").manifest.branches
    assert {slot.site for slot in slots} == {LAST}
    assert sorted((slot.settings["order"], slot.settings["join"], slot.settings["places"]) for slot in slots) == [
        (0, "a+h", ",".join(STATES)),
        (0, "present", STATES[1]),
        (1, "a", ",".join(STATES)),
    ]


def test_inspect_tells_what_it_is(made: tuple[Path, dict[str | None, np.ndarray]]) -> None:
    (adapter,) = read_adapters(made[0] / "both")
    facts = describe(adapter)
    assert (facts["width"], facts["layers"], facts["heads"]) == ({"min": 16, "max": 32}, 2, HEADS)
    assert facts["knowledge"] == ["factual", "linguistic"]
    assert facts["merge"]["exact"] is False


def test_names_and_layers_are_those_of_bert() -> None:
    """A part's encoder goes into transformers' own, whose names the authors' code has, and gives the same."""
    adapter = research.randomized(research.KAdapter(64, 32, places=1, layers=2, heads=HEADS), 3, scale=0.1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, layer_norm_eps=1e-5, attn_implementation="eager")
    encoder = BertEncoder(config).eval()
    part = adapter.part(0)
    encoder.load_state_dict(
        {key.removeprefix("encoder."): value for key, value in part.items() if key.startswith("encoder.")}
    )
    state = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        narrow = encoder(nn.functional.linear(state, part["down_project.weight"], part["down_project.bias"]))[0]
        expected = state + nn.functional.linear(narrow, part["up_project.weight"], part["up_project.bias"])
        assert torch.allclose(adapter([state]), expected, atol=1e-5)


WRONG = {
    "missing": ("roberta.embeddings.LayerNorm.encoder.layer.1.output.dense.bias", None, "is missing in"),
    "no place": ("roberta.embeddings.LayerNorm.gate", np.ones(3, np.float32), "is no part of a k_adapter"),
    "width": (
        *("roberta.embeddings.LayerNorm.encoder.layer.0.attention.self.key.weight", np.ones((8, 32), np.float32)),
        "need [32, 32]",
    ),
    "join": (f"{LAST}.com_dense.weight", np.ones((64, 64), np.float32), "need [64, 128]"),
    "norm": (
        *("roberta.embeddings.LayerNorm.encoder.layer.0.output.LayerNorm.weight", np.ones((1, 32), np.float32)),
        "not 1 axes",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_damaged_files_are_refused_by_name(
    case: str, made: tuple[Path, dict[str | None, np.ndarray]], tmp_path: Path
) -> None:
    key, value, message = WRONG[case]
    tensors = load_file(made[0] / "factual" / "adapter.safetensors")
    tensors.pop(key, None)
    tensors |= {} if value is None else {key: value}
    refused(made[0], tmp_path, tensors, {}, key, message)


SETTINGS = {
    "heads": ({"heads": 5}, "which 5 heads do not divide"),
    "no heads": ({"heads": 0}, "heads is 0, must be how many"),
    "fusion": ({"fusion": "mean"}, "fusion is 'mean', must be one of concat, add"),
    "names": ({"knowledge": ["a", "a"]}, "knowledge is ['a', 'a'], must be a list of different names"),
    "skip": ({"adapter_skip_layers": 3}, "adapter_skip_layers is 3, a setting that k_adapter does not have"),
    "module": ({"last": "roberta.encoder"}, "the adapter names module 'roberta.encoder', which"),
    "features": (
        {"last": "roberta.encoder.layer.1.intermediate.dense"},
        "module 'roberta.embeddings.LayerNorm' gives 64 numbers a token",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_do_not_fit_are_refused(
    case: str, made: tuple[Path, dict[str | None, np.ndarray]], tmp_path: Path
) -> None:
    changes, message = SETTINGS[case]
    tensors = load_file(made[0] / "factual" / "adapter.safetensors")
    last = changes.get("last", LAST)
    moved = {key.replace(f"{LAST}.com_dense", f"{last}.com_dense"): value for key, value in tensors.items()}
    refused(made[0], tmp_path, moved, changes, "", message)


def refused(
    folder: Path, tmp_path: Path, tensors: dict[str, np.ndarray], changes: dict[str, Any], key: str, message: str
) -> None:
    """Export an adapter that is not as it should be: it is refused, and nothing is written."""
    config = json.loads((folder / "factual" / "adapter_config.json").read_text())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, tmp_path / "x" / "adapter.safetensors")
    with pytest.raises(AdapterError) as caught:
        export_bundle(Recipe((tmp_path / "x",), str(folder / "base"), tmp_path / "out.bundle", quantize="none"))
    assert key in caught.value.message
    assert message in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_places_in_another_order_are_refused(made: tuple[Path, dict[str | None, np.ndarray]], tmp_path: Path) -> None:
    """A place that the model reaches after the one that the adapter changes has nothing to read yet."""
    tensors = load_file(made[0] / "factual" / "adapter.safetensors")
    early = "roberta.embeddings.LayerNorm"
    moved = {key.replace(f"{LAST}.com_dense", f"{early}.com_dense"): value for key, value in tensors.items()}
    config = json.loads((made[0] / "factual" / "adapter_config.json").read_text())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config | {"last": early}))
    save_file(moved, tmp_path / "x" / "adapter.safetensors")
    with pytest.raises(MergeError) as caught:
        export_bundle(Recipe((tmp_path / "x",), str(made[0] / "base"), tmp_path / "out.bundle", quantize="none"))
    assert caught.value.message == (
        "K-Adapter: the model runs 'roberta.encoder.layer.0.output.LayerNorm' after 'roberta.embeddings.LayerNorm', or "
        "not at all"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_decoder_is_refused(tmp_path: Path) -> None:
    """It mixes all tokens of a text, and a decoder sees them one after the other."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).save_pretrained(tmp_path / "base")
    place, last = "model.layers.1.input_layernorm", "model.norm"
    adapter = research.KAdapter(64, 8, places=1, layers=1, heads=2)
    (tmp_path / "x").mkdir()
    save_tensors(
        {f"{place}.{key}": value.detach().clone() for key, value in adapter.part(0).items()},
        tmp_path / "x" / "adapter.safetensors",
    )
    config = {"edgeadapt_type": "k_adapter", "modules": [place], "last": last, "heads": 2, "fusion": "add"}
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError) as caught:
        export_bundle(Recipe((tmp_path / "x",), str(tmp_path / "base"), tmp_path / "out.bundle", quantize="none"))
    assert caught.value.message == (
        "an adapter has a network (knowledge) beside module model.norm that sees the whole text at once, and this "
        "model generates a text piece by piece"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "x"]
