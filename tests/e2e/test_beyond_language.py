"""Adapters on models of pictures and speech, from export to swap: peft's LoRA, and systems that no library trains.

Each is compared with peft's own unmerged forward, or with a torch model after its paper (`research.py`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import nn

from edgeadapt.adapters import read_adapters
from edgeadapt.addition import verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.bundle.bundle import Bundle
from edgeadapt.errors import SessionError
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e import research
from tests.e2e.tiny import ARCHITECTURES, SMALL, save_adapter
from tests.parity import Parity

TOLERANCE = 1e-4
SMALLEST_EFFECT = 5e-3

Tune = Callable[[Any, Path], Any]
"""Puts an adapter into a model, saves it in a folder, and returns the model that is the reference."""


@dataclass(frozen=True)
class System:
    """A tiny base, the adapters that are tried on it, the inputs and the output that is compared."""

    model: Any
    config: Any
    task: str
    adapters: Mapping[str, Tune]
    inputs: Mapping[str, tuple[int, ...]]
    output: str = "logits"
    scale: float = 0.02
    """Of the random numbers that the base's weights get, on top of those that it begins with."""


def _lora(targets: list[str] | str, rank: int, saved: list[str] | None = None) -> Tune:
    """Return a LoRA of peft's."""

    def tune(model: Any, folder: Path) -> Any:
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=saved)
        fresh = copy.deepcopy(model)
        save_adapter(model, config, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(fresh, folder)

    return tune


def _hub(config: Any) -> Tune:
    """Return a bottleneck adapter of AdapterHub's, in every stack of layers."""

    def tune(model: Any, folder: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapters.init(model)
            model.add_adapter("mine", config=config)
            generator = torch.Generator().manual_seed(4)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if ".mine." in key:
                        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            options = {"with_head": False} if hasattr(model, "heads") else {}
            model.save_adapter(str(folder), "mine", use_safetensors=True, **options)
            model.set_active_adapters("mine")
        return model

    return tune


def _conv(paths: Mapping[str, int], *, width: int, stride: int, adds: str, head: bool = False) -> Tune:
    """Return a Conv-Adapter at convolutions with their numbers of channels."""

    def tune(model: Any, folder: Path) -> Any:
        parts = {}
        for seed, (path, channels) in enumerate(paths.items()):
            adapter = research.randomized(research.ConvAdapter(channels, width, stride=stride), seed + width)
            # beside the whole layer (convolution, norm, activation), as in the authors' ResNet-50
            place = path.rpartition(".")[0] if adds == "activated" else path
            research.replace(model, place, lambda layer, adapter=adapter: research.Parallel(layer, adapter))
            parts[path] = adapter
        whole = {"classifier.1": research.randomized(model.classifier[1], 9)} if head else {}
        research.save(folder, "conv_adapter", parts, whole=whole, groups=width, stride=stride, adds=adds)
        return model

    return tune


def _conv_sequential(model: Any, folder: Path) -> Any:
    path = "resnet.encoder.stages.1.layers.1.layer.0.convolution"
    adapter = research.randomized(research.ConvAdapter(8, 2, kernel=5), 3)

    class Sequential(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inner(x)
            return h + adapter(h)

    research.replace(model, path, Sequential)
    research.save(folder, "conv_adapter", {path: adapter}, placement="sequential", groups=2, padding=2)
    return model


def _clip(ratios: Mapping[str, float]) -> Tune:
    """Return a CLIP-Adapter at projections, all with one ratio."""

    def tune(model: Any, folder: Path) -> Any:
        parts = {}
        for seed, (path, ratio) in enumerate(ratios.items()):
            adapter = research.randomized(research.ClipAdapter(32, ratio), seed + 1)
            research.replace(model, path, lambda inner, adapter=adapter: research.Behind(inner, adapter))
            parts[path] = adapter
        research.save(folder, "clip_adapter", parts, ratio=next(iter(ratios.values())))
        return model

    return tune


def _behind(kind: Any, paths: list[str], width: int, **settings: Any) -> Tune:
    """Return bottlenecks that take the place of modules' outputs."""

    def tune(model: Any, folder: Path) -> Any:
        parts = {}
        for seed, path in enumerate(paths):
            adapter = research.randomized(kind(64, width), seed + width)
            research.replace(model, path, lambda inner, adapter=adapter: research.Behind(inner, adapter))
            parts[path] = adapter
        research.save(folder, "linear_adapter", parts, **settings)
        return model

    return tune


def _tiny(name: str) -> Any:
    """Return a config of the tiny models with one layer: they are traced."""
    config = next(item for item in ARCHITECTURES if item.name == name).model().config
    for part in (config, *(getattr(config, key, config) for key in ("text_config", "vision_config"))):
        for key in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"):
            if hasattr(part, key):
                setattr(part, key, 1)
    return config


_SPEECH = {
    **{key: value for key, value in SMALL.items() if key != "vocab_size"},
    "vocab_size": 32,
    "num_hidden_layers": 1,
    "conv_dim": (16, 16),
    "conv_stride": (10, 8),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "conv_depthwise_kernel_size": 5,
    "apply_spec_augment": False,
}
_NEMO = {"activation": "silu", "norm": True, "bias": False}
_HOULSBY = {"activation": "gelu"}
_LAYERS = "wav2vec2_conformer.encoder.layers"
_T5 = ["encoder.block.0.layer.0.SelfAttention.o", "encoder.block.0.layer.1.DenseReluDense.wo"]
_T5_DECODER = ["decoder.block.0.layer.1.EncDecAttention.o", "decoder.block.0.layer.2.DenseReluDense.wo"]
SYSTEMS = {
    "resnet": System(
        transformers.ResNetForImageClassification,
        transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], num_labels=4),
        "image-classification",
        {
            "Conv-Adapter-activated": _conv(
                {"resnet.encoder.stages.1.layers.1.layer.1.convolution": 8},
                width=4,
                stride=1,
                adds="activated",
                head=True,
            ),
            "Conv-Adapter-parallel": _conv(
                {"resnet.encoder.stages.1.layers.0.layer.1.convolution": 8}, width=2, stride=2, adds="output"
            ),
            "Conv-Adapter-sequential": _conv_sequential,
        },
        {"pixel_values": (2, 3, 32, 32)},
    ),
    "clip": System(
        transformers.CLIPModel,
        _tiny("clip"),
        "zero-shot-image-classification",
        {
            # a LoRA in each of the towers, and in both
            "LoRA-image-tower": _lora(r"vision_model.*\.(q_proj|fc1)|visual_projection", 4),
            "LoRA-text-tower": _lora(r"text_model.*\.(v_proj|fc2)|text_projection", 2),
            "LoRA-both-towers": _lora(["k_proj", "out_proj"], 3),
            "Houlsby-both-towers": _hub(adapters.DoubleSeqBnConfig(reduction_factor=8, non_linearity="relu")),
            "Pfeiffer-both-towers": _hub(adapters.SeqBnConfig(reduction_factor=8)),
            "CLIP-Adapter-image": _clip({"visual_projection": 0.2}),
            "CLIP-Adapter-both": _clip({"visual_projection": 0.6, "text_projection": 0.6}),
            "CLIP-Adapter-ratio-1": _clip({"visual_projection": 1.0}),
        },
        {"pixel_values": (2, 3, 32, 32), "input_ids": (3, 7), "attention_mask": (3, 7)},
        "logits_per_image",
    ),
    "efficientnet": System(
        transformers.EfficientNetForImageClassification,
        transformers.EfficientNetConfig(
            image_size=32,
            width_coefficient=0.25,
            depth_coefficient=1.0,
            hidden_dim=320,
            num_labels=4,
            in_channels=[32, 32],
            out_channels=[32, 64],
            kernel_sizes=[3, 3],
            strides=[1, 2],
            num_block_repeats=[1, 1],
            expand_ratios=[1, 2],
            depthwise_padding=[],
        ),
        "image-classification",
        {
            "LoRA-expand-project": _lora(["expand_conv", "project_conv"], 2, ["classifier"]),
            "Conv-Adapter-activated": _conv(
                {"efficientnet.encoder.blocks.0.depthwise_conv.depthwise_conv": 8}, width=4, stride=1, adds="activated"
            ),
        },
        {"pixel_values": (2, 3, 32, 32)},
        scale=1.0,
    ),
    # depth-wise convolutions of 7 x 7; peft wants a rank that their groups divide, and cannot wrap EfficientNet's own
    "convnext": System(
        transformers.ConvNextForImageClassification,
        transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=4, image_size=32),
        "image-classification",
        {"LoRA-depthwise": _lora(["dwconv"], 16, ["classifier"]), "LoRA-pointwise": _lora(["pwconv1", "pwconv2"], 2)},
        {"pixel_values": (2, 3, 32, 32)},
    ),
    # grouped convolutions beside plain ones
    "regnet": System(
        transformers.RegNetForImageClassification,
        transformers.RegNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, num_labels=4, layer_type="x"
        ),
        "image-classification",
        {
            "LoRA-grouped": _lora(["convolution"], 8, ["classifier.1"]),
            "LoRA-1x1": _lora(r".*stages\.1\.layers\.\d\.layer\.0\.convolution", 2),
        },
        {"pixel_values": (2, 3, 32, 32)},
    ),
    "conformer": System(
        transformers.Wav2Vec2ConformerForCTC,
        transformers.Wav2Vec2ConformerConfig(**_SPEECH, position_embeddings_type="relative"),
        "automatic-speech-recognition",
        {
            "LoRA": _lora(["linear_q", "linear_v", "intermediate_dense"], 4),
            "LoRA-and-head": _lora(["linear_out", "output_dense"], 2, ["lm_head"]),
            "NeMo-LinearAdapter": _behind(
                research.LinearAdapter, [f"{_LAYERS}.0.final_layer_norm", f"{_LAYERS}.0.ffn2.output_dense"], 8, **_NEMO
            ),
            "NeMo-LinearAdapter-narrow": _behind(research.LinearAdapter, [f"{_LAYERS}.0.final_layer_norm"], 4, **_NEMO),
        },
        {"input_values": (2, 700)},
    ),
    "whisper": System(
        transformers.WhisperForConditionalGeneration,
        _tiny("whisper"),
        "automatic-speech-recognition",
        {
            "Houlsby": _hub(adapters.DoubleSeqBnConfig(reduction_factor=8)),
            "Houlsby-encoder": _behind(
                research.HoulsbyAdapter,
                [f"model.encoder.layers.0.{part}" for part in ("self_attn.out_proj", "fc2")],
                8,
                **_HOULSBY,
            ),
            "Houlsby-decoder": _behind(
                research.HoulsbyAdapter,
                [f"model.decoder.layers.0.{part}" for part in ("encoder_attn.out_proj", "fc2")],
                4,
                **_HOULSBY,
            ),
        },
        {"input_features": (2, 8, 40), "decoder_input_ids": (2, 5)},
    ),
    # VL-Adapter's are in the language model behind a frozen CLIP
    "t5": System(
        transformers.T5ForConditionalGeneration,
        _tiny("t5"),
        "text2text-generation",
        {
            "VL-Adapter-encoder": _behind(research.HoulsbyAdapter, _T5, 8, **_HOULSBY),
            "VL-Adapter-both": _behind(research.HoulsbyAdapter, [*_T5, *_T5_DECODER], 4, **_HOULSBY),
        },
        {"input_ids": (2, 7), "attention_mask": (2, 7), "decoder_input_ids": (2, 5)},
    ),
}


def test_a_model_of_two_towers_is_two_graphs_with_one_manifest(tmp_path: Path, parity: Parity) -> None:
    """LoRA in one tower or in both, and a CLIP-Adapter; each tower runs alone, or both at once."""
    torch.manual_seed(0)
    model = research.randomized(transformers.CLIPModel(_tiny("clip")), 1, scale=0.02)
    model.save_pretrained(tmp_path / "base")
    tunes = {
        "LoRA-image-tower": _lora(r"vision_model.*\.(q_proj|fc1)|visual_projection", 4),
        "LoRA-both-towers": _lora(["q_proj", "fc2"], 2),
        "CLIP-Adapter-both": _clip({"visual_projection": 0.3, "text_projection": 0.3}),
    }
    references = {name: tune(copy.deepcopy(model), tmp_path / name) for name, tune in tunes.items()}
    output = tmp_path / "out.bundle"

    export_bundle(
        Recipe(
            tuple(tmp_path / name for name in tunes),
            str(tmp_path / "base"),
            output,
            task="feature-extraction",
            quantize="none",
        )
    )

    bundle = open_bundle(output)
    assert {role: record.inputs for role, record in bundle.manifest.graphs.items()} == {
        "image": ("pixel_values",),
        "text": ("input_ids", "attention_mask"),
    }
    assert {slot.graphs for slot in bundle.manifest.slots} == {("image",), ("text",)}
    inputs = inputs_of(SYSTEMS["clip"])
    texts = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with open_session(output) as session:
        before = session.run(inputs)
        assert set(before) == {"image_embeds", "text_embeds"}
        for name, reference in references.items():
            session.use(name)
            both = session.run(inputs)
            for part, given in (("image_embeds", {"pixel_values": inputs["pixel_values"]}), ("text_embeds", texts)):
                expected = forward(reference, inputs, part)
                error = float(np.abs(both[part] - expected).max() / np.abs(expected).max())
                _tell(parity, tmp_path / name, "clip (two graphs)", error)
                assert error <= TOLERANCE
                assert session.run(given)[part].tobytes() == both[part].tobytes()
            change = np.abs(both["text_embeds"] - before["text_embeds"]).max()
            assert change <= 1e-6 if name == "LoRA-image-tower" else change >= SMALLEST_EFFECT
        session.use(None)
        again = session.run(inputs)
        assert all(again[part].tobytes() == before[part].tobytes() for part in before)
        with pytest.raises(SessionError) as caught:
            session.run({"pixel_values": inputs["pixel_values"], "sound": inputs["pixel_values"]})
    assert caught.value.message == "unknown input 'sound'"
    assert bundle.manifest.parity["max_relative_error"] <= TOLERANCE
    assert verify_bundle(output) == []


def _tell(parity: Parity, folder: Path, model: str, error: float) -> None:
    kinds = {"adapterhub": "adapters", "peft": "peft", "edgeadapt": research.SOURCE}
    source = kinds[read_adapters(folder)[0].layout]
    parity.add(folder, model, source=source, adapter=folder.name, errors={"swapped": error})


def inputs_of(system: System) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    made: dict[str, np.ndarray] = {}
    for name, shape in system.inputs.items():
        if name.endswith("input_ids"):
            made[name] = generator.integers(3, 127, shape)
        elif name == "attention_mask":
            made[name] = np.ones(shape, np.int64)
        else:
            made[name] = generator.standard_normal(shape).astype(np.float32)
    return made


def forward(model: Any, inputs: Mapping[str, np.ndarray], output: str) -> np.ndarray:
    with torch.no_grad():
        result = model.eval()(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return np.asarray(result[output])


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_adapter_over_one_base_equals_its_reference(name: str, tmp_path: Path, parity: Parity) -> None:
    system = SYSTEMS[name]
    torch.manual_seed(0)
    model = research.randomized(system.model(system.config), 1, scale=system.scale)
    base = tmp_path / "base"
    model.save_pretrained(base)
    inputs = inputs_of(system)
    expected = {None: forward(model, inputs, system.output)}
    folders = []
    for adapter, tune in system.adapters.items():
        folders.append(tmp_path / adapter)
        expected[adapter] = forward(tune(copy.deepcopy(model), tmp_path / adapter), inputs, system.output)
    output = tmp_path / "out.bundle"

    export_bundle(Recipe(tuple(folders), str(base), output, task=system.task, quantize="none"))

    first, *others = system.adapters
    order = (None, first, *others, first, None, *reversed(others))
    found: dict[str | None, set[bytes]] = {adapter: set() for adapter in order}
    answers = {}
    with open_session(output) as session:
        for used in order:
            session.use(used)
            answers[used] = session.run(inputs)[system.output]
            found[used].add(answers[used].tobytes())
    assert all(len(runs) == 1 for runs in found.values())
    for used, reference in expected.items():
        largest = np.abs(reference).max()
        error = float(np.abs(answers[used] - reference).max() / largest)
        assert error <= TOLERANCE, used
        if used is not None:
            _tell(parity, tmp_path / used, name, error)
            assert np.abs(reference - expected[None]).max() >= SMALLEST_EFFECT * largest, used
    bundle = open_bundle(output)
    assert bundle.manifest.parity["max_relative_error"] <= TOLERANCE
    assert verify_bundle(output) == []
    _the_slots_graph_without_an_adapter_is_the_base(bundle, inputs)


def _the_slots_graph_without_an_adapter_is_the_base(bundle: Bundle, inputs: Mapping[str, np.ndarray]) -> None:
    record = bundle.manifest.graphs.get("model")
    if record is None:  # an encoder and a decoder: parity has compared both
        return
    plain, slots = (
        onnxruntime.InferenceSession(bundle.file(file), providers=["CPUExecutionProvider"]).run(None, inputs)[0]
        for file in (record.plain, record.slots)
    )
    assert np.abs(plain - slots).max() <= 1e-6 * np.abs(plain).max()
