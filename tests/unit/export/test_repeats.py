"""Equal layers are traced once: the graph is the one that tracing all layers gives, or all layers are traced."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers

from edgeadapt.export import export as exporting
from edgeadapt.export.export import export_graph, task_of
from edgeadapt.export.repeats import Repeat, find_repeat, shortened
from edgeadapt.export.trace import markers
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.load import base_from_module
from edgeadapt.merging.modules import target_modules

LAYERS = 6
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
DECODER = {**SMALL, "num_hidden_layers": LAYERS, "num_key_value_heads": 1, "max_position_embeddings": 16}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What `find_repeat` and `stamp` returned, in order."""
    found: list[Any] = []
    for name in ("find_repeat", "stamp"):
        original = getattr(exporting, name)

        def watched(*args: Any, original: Any = original) -> Any:
            found.append(original(*args))
            return found[-1]

        monkeypatch.setattr(exporting, name, watched)
    return found


def _base(model: Any, task: str = "text-generation") -> BaseModel:
    model.eval().requires_grad_(requires_grad=False)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter))
    model.config._attn_implementation = "eager"
    return BaseModel(model, "tiny", None, task, model.config.model_type, target_modules(model))


def _llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, **settings))


def _gpt2(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=16, **settings)
    return transformers.GPT2LMHeadModel(config)


def _bert() -> Any:
    config = transformers.BertConfig(**SMALL, num_hidden_layers=LAYERS, max_position_embeddings=16)
    return transformers.BertModel(config)


def _fingerprint(model: ir.Model) -> Any:
    """Return what is equal for equal graphs, whatever their inner values are called."""
    names: dict[ir.Value, str] = {}

    def digest(*parts: object) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def constant(tensor: ir.TensorProtocol) -> str:
        return digest(str(tensor.dtype), tuple(tensor.shape.numpy()), tensor.tobytes())

    def named(value: ir.Value | None) -> str:
        if value is None:
            return "none"
        if value not in names:
            is_input = value.is_graph_input()
            names[value] = digest("input", value.name) if is_input else constant(value.const_value)
        return names[value]

    nodes: Counter[str] = Counter()
    for node in model.graph:
        attributes = [
            (name, constant(a.value) if a.type == ir.AttributeType.TENSOR else a.value)
            for name, a in sorted(node.attributes.items())
        ]
        key = digest(node.op_identifier(), attributes, [named(value) for value in node.inputs])
        nodes[key] += 1
        names.update({value: digest(key, index) for index, value in enumerate(node.outputs)})
    inputs = [(value.name, str(value.shape)) for value in model.graph.inputs]
    outputs = [(value.name, str(value.shape), names[value]) for value in model.graph.outputs]
    data = [constant(value.const_value) for value in model.graph.initializers.values()]
    return inputs, outputs, nodes, data


def _find(base: BaseModel) -> Repeat | None:
    task = task_of(base)
    with torch.no_grad(), task.tracing(base), markers(base.module, base.modules, ()):
        return find_repeat(base.module, task.traces(base)["decoder"])


def _whole(base: BaseModel, role: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(exporting, "find_repeat", lambda *_: None)
    return _fingerprint(export_graph(base).models[role])


@pytest.mark.parametrize(
    ("model", "task", "role", "path"),
    [
        pytest.param(_llama, "text-generation", "decoder", "model.layers", id="llama"),
        pytest.param(_gpt2, "text-generation", "decoder", "transformer.h", id="gpt2"),
        pytest.param(_bert, "feature-extraction", "model", "encoder.layer", id="bert"),
    ],
)
def test_the_graph_is_that_of_all_layers(
    model: Any, task: str, role: str, path: str, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _base(model(), task)

    stamped = _fingerprint(export_graph(base).models[role])

    assert seen == [Repeat(path, LAYERS), True]
    assert stamped == _whole(base, role, monkeypatch)


def test_the_module_is_as_before() -> None:
    base = _base(_llama())
    layers = base.module.model.layers
    before = {name: tensor.clone() for name, tensor in base.module.state_dict().items()}

    repeat = _find(base)
    assert repeat is not None
    with shortened(base.module, repeat) as stand_ins:
        assert len(base.module.model.layers) == 3
        assert set(stand_ins.values()) == {name for name in before if re.match(r"model\.layers\.[12]\.", name)}
        assert not any(torch.equal(before[name], base.module.state_dict()[name]) for name in stand_ins.values())

    assert base.module.model.layers is layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.module.state_dict().items())


def test_a_constant_made_of_weights_is_not_taken_for_one_of_all_layers(seen: list[Any]) -> None:
    # Gemma's norms multiply by 1 + weight, which is folded. The weights differ in a layer that would not be traced.
    base = _base(transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER, head_dim=8)))
    for layer in base.module.model.layers:
        layer.input_layernorm.weight.fill_(0.5)
    base.module.model.layers[4].input_layernorm.weight.fill_(0.25)

    model = export_graph(base).models["decoder"]

    assert seen == [Repeat("model.layers", LAYERS), False]
    folded = [tuple(value.const_value.numpy().reshape(-1)) for value in model.graph.initializers.values()]
    assert (1.25,) * 16 in folded


def test_layers_with_scales_of_their_own_are_seen() -> None:
    assert _find(_base(_gpt2())) is not None
    assert _find(_base(_gpt2(scale_attn_by_inverse_layer_idx=True))) is None


def test_layers_with_windows_of_their_own_are_seen() -> None:
    kinds = ["full_attention"] * (LAYERS - 1) + ["sliding_attention"]
    config = transformers.Qwen2Config(**DECODER, layer_types=kinds, use_sliding_window=True, sliding_window=4)
    assert _find(_base(transformers.Qwen2ForCausalLM(config))) is None


def test_replaced_weights_in_layers_are_traced_whole(seen: list[Any]) -> None:
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(LAYERS)]
    graph = export_graph(_base(_llama()), replaced=names)
    assert len(seen) == 1
    marked = [
        n.attributes["parameter"].as_string() for n in graph.models["decoder"].graph if n.op_type == "ParameterSite"
    ]
    assert marked == names


class _Block(torch.nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, width)
        self.down = torch.nn.Linear(width, 8)

    def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return x + factor * self.down(torch.relu(self.up(x)))


class _Stack(torch.nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        widths = [8] * LAYERS if kind != "wider" else [8, 8, 8, 8, 12, 8]
        self.blocks = torch.nn.ModuleList([_Block(width) for width in widths])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x
        for index, block in enumerate(self.blocks):
            if self.kind == "between" and index == 4:
                x = x * 2
            x = block(x, 0.5 if self.kind == "argument" and index == 4 else 1.0)
            if (self.kind == "early" and index == 1) or (self.kind == "late" and index == 4):
                kept = x
            if self.kind == "beside" and index == 1:
                kept = x * 3
        return x + kept if self.kind in ("early", "late", "beside") else x


@pytest.mark.parametrize("kind", ["plain", "between", "beside", "argument", "wider", "early", "late"])
def test_a_layer_that_differs_is_seen(kind: str, seen: list[Any]) -> None:
    torch.manual_seed(0)
    stack = _Stack(kind)
    x = torch.randn(2, 8)
    base = base_from_module(stack, name="stack", example_inputs={"x": x}, dynamic_axes={"x": {0: "batch"}})

    model = export_graph(base).models["model"]

    assert seen == ([Repeat("blocks", LAYERS), True] if kind == "plain" else [None])
    sites = [node.attributes["site"].as_string() for node in model.graph if node.op_type == "AdapterSite"]
    assert sites == [f"blocks.{index}.{name}" for index in range(LAYERS) for name in ("up", "down")]
