"""Tiny random models of every architecture that the export supports, with adapters saved by the real peft library."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}
ENCODER = {**SMALL, "max_position_embeddings": 64, "num_labels": 3}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}


@dataclass(frozen=True)
class Architecture:
    """One architecture: how to build it, and which modules two adapters of different rank change."""

    name: str
    model: Callable[[], Any]
    task: str
    targets: tuple[list[str] | str, list[str] | str]
    saved: list[str] | None = None


def _from(model: str, config: str, **values: Any) -> Callable[[], Any]:
    def build() -> Any:
        from transformers.models import gemma3

        config_class = getattr(transformers, config, None) or getattr(gemma3, config)
        model_class = getattr(transformers, model, None) or getattr(gemma3, model)
        return model_class(config_class(**values))

    return build


def _clip() -> Any:
    text = {**SMALL, "max_position_embeddings": 20, "projection_dim": 32}
    config = transformers.CLIPConfig(text_config=text, vision_config={**IMAGE, "projection_dim": 32}, projection_dim=32)
    return transformers.CLIPModel(config)


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
TEXT = "text-generation"

ARCHITECTURES = (
    Architecture("llama", _from("LlamaForCausalLM", "LlamaConfig", **DECODER), TEXT, (LLAMA, QV)),
    Architecture(
        "llama-tied",
        _from("LlamaForCausalLM", "LlamaConfig", **DECODER, tie_word_embeddings=True),
        TEXT,
        ([*LLAMA, "embed_tokens"], QV),
    ),
    Architecture("qwen2", _from("Qwen2ForCausalLM", "Qwen2Config", **DECODER), TEXT, (LLAMA, QV)),
    Architecture("qwen3", _from("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=16), TEXT, (LLAMA, QV)),
    Architecture(
        "mistral", _from("MistralForCausalLM", "MistralConfig", **DECODER, sliding_window=4), TEXT, (LLAMA, QV)
    ),
    Architecture("gemma", _from("GemmaForCausalLM", "GemmaConfig", **DECODER, head_dim=16), TEXT, (LLAMA, QV)),
    Architecture(
        "gemma2",
        _from("Gemma2ForCausalLM", "Gemma2Config", **DECODER, head_dim=16, sliding_window=4),
        TEXT,
        (LLAMA, QV),
    ),
    Architecture(
        "gemma3",
        _from("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER, head_dim=16, sliding_window=4),
        TEXT,
        (LLAMA, QV),
    ),
    Architecture(
        "phi",
        _from("PhiForCausalLM", "PhiConfig", **{**DECODER, "num_attention_heads": 2, "num_key_value_heads": 2}),
        TEXT,
        (["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"], QV),
    ),
    Architecture(
        "phi3",
        _from("Phi3ForCausalLM", "Phi3Config", **DECODER, pad_token_id=0),
        TEXT,
        (["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], ["qkv_proj"]),
    ),
    Architecture(
        "gpt2",
        _from("GPT2LMHeadModel", "GPT2Config", vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        TEXT,
        (["c_attn", "c_proj", "c_fc"], ["c_attn"]),
    ),
    Architecture(
        "bert",
        _from("BertForSequenceClassification", "BertConfig", **ENCODER),
        "text-classification",
        (["query", "key", "value", "dense"], ["query", "value"]),
        ["classifier"],
    ),
    Architecture(
        "bert-embedding",
        _from("BertModel", "BertConfig", **ENCODER),
        "feature-extraction",
        (["query", "key", "value", "dense"], ["query", "value"]),
    ),
    Architecture(
        "modernbert",
        _from(
            "ModernBertForSequenceClassification",
            "ModernBertConfig",
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            local_attention=8,
            global_attn_every_n_layers=2,
            num_labels=3,
            **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 1),
        ),
        "text-classification",
        (["Wqkv", "Wo", "Wi"], ["Wqkv"]),
        ["classifier"],
    ),
    Architecture(
        "distilbert",
        _from(
            "DistilBertForTokenClassification",
            "DistilBertConfig",
            vocab_size=128,
            dim=64,
            n_layers=2,
            n_heads=4,
            hidden_dim=96,
            max_position_embeddings=64,
            num_labels=5,
        ),
        "token-classification",
        (["q_lin", "v_lin", "lin1"], ["q_lin"]),
        ["classifier"],
    ),
    Architecture(
        "roberta",
        _from("RobertaForSequenceClassification", "RobertaConfig", **ENCODER),
        "text-classification",
        (["query", "value", "dense"], ["query"]),
        None,
    ),
    Architecture(
        "vit",
        _from("ViTForImageClassification", "ViTConfig", **IMAGE, num_labels=3),
        "image-classification",
        (["query", "value"], ["query"]),
        ["classifier"],
    ),
    Architecture(
        "resnet",
        _from(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[1, 2],
            num_labels=4,
        ),
        "image-classification",
        (["convolution"], r".*stages\.1.*convolution"),
        ["classifier.1"],
    ),
    Architecture(
        "efficientnet",
        _from(
            "EfficientNetForImageClassification",
            "EfficientNetConfig",
            image_size=32,
            width_coefficient=0.25,
            depth_coefficient=0.2,
            hidden_dim=320,
            num_labels=4,
        ),
        "image-classification",
        (["expand_conv", "project_conv"], ["project_conv"]),
        ["classifier"],
    ),
    Architecture("clip", _clip, "zero-shot-image-classification", ([*QV, "fc1", "visual_projection"], QV)),
    Architecture(
        "t5",
        _from(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=128,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        "text2text-generation",
        (["q", "k", "v", "o", "wi", "wo"], ["q", "v"]),
    ),
    Architecture(
        "whisper",
        _from(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=128,
            num_mel_bins=8,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_source_positions=20,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        ),
        "automatic-speech-recognition",
        ([*QV, "fc1", "fc2"], QV),
    ),
)


def build(architecture: Architecture, folder: Path) -> tuple[Path, list[Path]]:
    """Save a tiny base and two adapters of rank 4 and 2 that act, and return their folders."""
    torch.manual_seed(0)
    model = architecture.model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    base = folder / "base"
    model.save_pretrained(base)
    adapters = []
    for index, targets in enumerate(architecture.targets):
        torch.manual_seed(index + 1)
        fresh = type(model).from_pretrained(base)
        rank = 4 - 2 * index
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=architecture.saved, task_type=None
        )
        adapters.append(save_adapter(fresh, config, folder / f"adapter{index}"))
    return base, adapters


def save_adapter(model: Any, config: LoraConfig, folder: Path, name: str = "default") -> Path:
    """Let peft put an adapter on `model`, give it random values, and save it; return its folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on Conv1D, tied weights, other class counts: what is tested here
        tuned = get_peft_model(model, config, adapter_name=name)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        tuned.save_pretrained(folder)
    return folder if name == "default" else folder / name
