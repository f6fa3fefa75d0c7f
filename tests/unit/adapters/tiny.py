"""Tiny bases, adapters saved by the real peft, and a reference forward of a `ResolvedAdapter`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from edgeadapt.adapters.adapter import ResolvedAdapter, TargetModule
from edgeadapt.adapters.base_copy import digest_of

torch.set_num_threads(1)


class ConvNet(nn.Module):
    """A kernel above 1, a stride, a bias-free 1x1, groups, and two heads in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(pixel_values)))
        x = torch.relu(self.grouped(torch.relu(self.point(x))))
        return self.classifier(x.mean((2, 3), keepdim=True))


class ScaledEmbedding(nn.Embedding):
    """Like Gemma 3's: the rows are multiplied on the way out."""

    embed_scale = 3.0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = ScaledEmbedding(20, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids))


_BERT = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


def _llama(*, tied: bool, attention_bias: bool = False) -> nn.Module:
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
    )
    return LlamaForCausalLM(config)


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _llama(tied=False),
    "llama-bias": lambda: _llama(tied=False, attention_bias=True),
    "llama-tied": lambda: _llama(tied=True),
    "bert": lambda: BertModel(BertConfig(**_BERT)),
    "bert-classifier": lambda: BertForSequenceClassification(BertConfig(**_BERT, num_labels=3)),
    "bert-mlm": lambda: BertForMaskedLM(BertConfig(**_BERT)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=30, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
    "conv": ConvNet,
    "tagger": Tagger,
}


def build(name: str) -> nn.Module:
    """Return a tiny base, the same weights at every call; biases and norms away from 0 and 1."""
    torch.manual_seed(7)
    model = _BUILDERS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert key
    return model


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    if name == "conv":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    return {"input_ids": torch.randint(0, 20, (2, 5))}


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


_TYPES = {nn.Linear: "linear", Conv1D: "conv1d", nn.Conv2d: "conv2d", nn.Embedding: "embedding"}


def target_modules(model: nn.Module, *, values: bool = True) -> dict[str, TargetModule]:
    """Return the modules of a torch model as numpy needs to know them; without `values`, as a bundle knows them."""
    result = {}
    for path, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, nn.Parameter):
            continue
        kind = next((name for cls, name in _TYPES.items() if isinstance(module, cls)), "norm")
        kind = kind if kind != "norm" or weight.ndim == 1 else "other"
        array = weight.detach().numpy()
        out = array.shape[1] if kind in ("conv1d", "embedding") else array.shape[0]
        groups = getattr(module, "groups", 1) if kind == "conv2d" else 1
        inner = {"linear": array.shape[-1], "conv2d": groups * (array.shape[1] if array.ndim > 1 else 1)}
        result[path] = TargetModule(
            path=path,
            type=kind,  # type: ignore[arg-type]
            class_name=type(module).__name__,
            weight_shape=array.shape,
            in_features=inner.get(kind, array.shape[0]),
            out_features=out,
            has_bias=isinstance(bias, nn.Parameter),
            digest=digest_of(array),
            groups=groups,
            output_scale=getattr(module, "embed_scale", None),
            weight=(lambda array=array: array) if values else None,
            bias=(lambda bias=bias: bias.detach().numpy()) if values and isinstance(bias, nn.Parameter) else None,
        )
    return result


def attach(model: nn.Module, resolved: ResolvedAdapter) -> nn.Module:
    """Return a copy of the base that computes y' = (y + (x A) B) * gain + offset at the sites, unties and replaces."""
    model = copy.deepcopy(model)
    for name, value in resolved.replaced.items():
        path, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(path), parameter, nn.Parameter(torch.from_numpy(value.copy())))
    for path, site in resolved.sites.items():
        module = model.get_submodule(path)
        terms = {
            key: None if (value := getattr(site, key)) is None else torch.from_numpy(value)
            for key in ("a", "b", "gain", "offset")
        }
        module.register_forward_hook(lambda module, args, y, terms=terms: _apply(module, args[0], y, terms))
    return model


def _apply(module: nn.Module, x: torch.Tensor, y: torch.Tensor, terms: dict[str, torch.Tensor | None]) -> torch.Tensor:
    a, b, gain, offset = (terms[key] for key in ("a", "b", "gain", "offset"))
    shape = (1, -1, 1, 1) if isinstance(module, nn.Conv2d | nn.GroupNorm) else (-1,)
    if a is not None and isinstance(module, nn.Conv2d):
        y = y + F.conv2d(F.conv2d(x, a, stride=module.stride, padding=module.padding), b)
    elif a is not None and isinstance(module, nn.Embedding):
        y = y + a[x] @ b
    elif a is not None:
        y = y + x @ a @ b
    y = y if gain is None else y * gain.view(shape)
    return y if offset is None else y + offset.view(shape)


def train(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Return the model with an adapter whose every trained number is away from its start."""
    torch.manual_seed(11)
    peft_model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return peft_model


def save(folder: Path, base: str, **settings: object) -> Path:
    """Train and save an adapter for a base by name; return its folder."""
    train(build(base), LoraConfig(**settings)).save_pretrained(str(folder))  # type: ignore[arg-type]
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file)


def relative_error(measured: torch.Tensor, reference: torch.Tensor) -> float:
    return float((measured - reference).abs().max() / reference.abs().max())


def resolved_values(resolved: ResolvedAdapter) -> dict[str, np.ndarray]:
    sites = {
        f"{path}.{term}": value
        for path, site in resolved.sites.items()
        for term in ("a", "b", "gain", "offset")
        if (value := getattr(site, term)) is not None
    }
    return {**sites, **resolved.replaced}
