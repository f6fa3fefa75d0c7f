"""Tiny random models saved by transformers, and adapters on them saved by peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from edgeadapt.adapters import read_adapters
from edgeadapt.adapters.adapter import Adapter
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.load import base_from_module, load_base_model

torch.set_num_threads(1)
VOCAB = 64
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


class ConvNet(torch.nn.Module):
    """Two convolutions, a batch norm and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.point = torch.nn.Conv2d(8, 12, 1, bias=False)
        self.depth = torch.nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.depth(torch.relu(self.point(self.norm(self.stem(pixels)))))
        return self.head(features.mean(dim=(2, 3)))


def _build(name: str) -> Any:
    t = transformers
    if name.startswith("llama"):
        return t.LlamaForCausalLM(t.LlamaConfig(**LLAMA, tie_word_embeddings=name == "llama-tied"))
    if name == "gpt2":
        config = t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
                              eos_token_id=2)  # fmt: skip
        return t.GPT2LMHeadModel(config)
    if name == "t5":
        config = t.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                            decoder_start_token_id=0)  # fmt: skip
        return t.T5ForConditionalGeneration(config)
    if name == "bert":
        return t.BertModel(t.BertConfig(**BERT))
    if name == "bert-classifier":
        return t.BertForSequenceClassification(t.BertConfig(**BERT, num_labels=3))
    if name == "resnet":
        config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
        return t.ResNetForImageClassification(config)
    raise KeyError(name)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a model's name to the folder that it is saved in."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            torch.manual_seed(7)
            made[name] = tmp_path_factory.mktemp("models") / name
            _build(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def base_of(folder_of: Callable[[str], Path]) -> Callable[[str], BaseModel]:
    """Return a function from a model's name to the loaded base; the same object each time."""
    made: dict[str, BaseModel] = {}

    def base(name: str) -> BaseModel:
        if name not in made:
            if name == "conv-net":
                torch.manual_seed(7)
                made[name] = base_from_module(
                    ConvNet(),
                    name=name,
                    example_inputs={"pixels": torch.randn(2, 3, 16, 16)},
                    dynamic_axes={"pixels": {0: "batch"}},
                    output_names=("scores",),
                )
            else:
                made[name] = load_base_model(folder_of(name))
        return made[name]

    return base


def cases_for(base: BaseModel) -> list[dict[str, torch.Tensor]]:
    """Return two inputs of different lengths, the second with padding."""
    generator = torch.Generator().manual_seed(3)
    if base.task in {"module", "image-classification"}:
        name = "pixels" if base.task == "module" else "pixel_values"
        return [{name: torch.randn(n, 3, 16, 16, generator=generator)} for n in (1, 2)]
    cases = []
    for batch, length in ((1, 5), (3, 9)):
        ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, length - 2 :] = 0 if batch > 1 else 1
        case = {"input_ids": ids, "attention_mask": mask}
        if base.task == "text2text-generation":
            case["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, 4), generator=generator)
        cases.append(case)
    return cases


def save_adapter(model: torch.nn.Module, folder: Path, *, seed: int = 0, name: str = "default", **config: Any) -> Path:
    """Let peft put a LoRA of this config on `model`, give it random values, and save it; return its folder."""
    torch.manual_seed(seed)
    tuned = get_peft_model(model, LoraConfig(**config), adapter_name=name)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    tuned.save_pretrained(folder)
    return folder if name == "default" else folder / name


@pytest.fixture
def adapt(base_of: Callable[[str], BaseModel], tmp_path: Path) -> Callable[..., Adapter]:
    """Return a function that trains (at random) an adapter on a model's copy, saves it with peft and reads it."""

    def make(base: str | BaseModel, folder: str = "adapter", **config: Any) -> Adapter:
        from edgeadapt.merging.reference import _own_weights

        found = base_of(base) if isinstance(base, str) else base
        model = _own_weights(found)
        return read_adapters(save_adapter(model, tmp_path / folder, **config))[0]

    return make
