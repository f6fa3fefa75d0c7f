"""Every weight-space type of peft on tiny models: configs, and adapters that the real peft has saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from tests.e2e.reference import base_model

QVD = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One type on one base.

    kind: edgeadapt's name; config: makes peft's config; model: a name in `tests.e2e.tiny`; noise: the deviation of what
    is added to every trained number, so that the adapter acts
    """

    kind: str
    config: Callable[[], peft.PeftConfig]
    model: str = "llama"
    noise: float = 0.1


def _config(name: str, **fields: Any) -> Callable[[], peft.PeftConfig]:
    def make() -> peft.PeftConfig:
        config: peft.PeftConfig = getattr(peft, name)(**fields)
        return config

    return make


LLAMA = (
    Case("adalora", _config("AdaLoraConfig", init_r=6, target_r=4, target_modules=QVD, total_step=10)),
    Case("adamss", _config("AdamssConfig", r=4, target_modules=QVD)),
    Case("beft", _config("BeftConfig", target_modules=QVD)),
    Case("boft", _config("BOFTConfig", boft_block_size=8, target_modules=QVD)),
    Case("c3a", _config("C3AConfig", block_size=16, target_modules=QVD)),
    Case("deft", _config("DeftConfig", r=4, target_modules=QVD)),
    Case("delora", _config("DeloraConfig", r=4, target_modules=QVD)),
    Case("fourierft", _config("FourierFTConfig", n_frequency=50, target_modules=QVD)),
    Case("frod", _config("FrodConfig", target_modules=QVD, progressbar=False)),
    Case("glora", _config("GloraConfig", r=4, target_modules=QVD)),
    Case("gralora", _config("GraloraConfig", r=4, target_modules=QVD)),
    Case("hira", _config("HiraConfig", r=4, target_modules=QVD), noise=0.3),
    Case("hra", _config("HRAConfig", r=4, target_modules=QVD)),
    Case("ia3", _config("IA3Config", target_modules=QVD, feedforward_modules=["down_proj"])),
    Case("ln_tuning", _config("LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm"])),
    Case("loha", _config("LoHaConfig", r=3, target_modules=QVD)),
    Case("lokr", _config("LoKrConfig", r=3, target_modules=QVD)),
    Case("miss", _config("MissConfig", r=4, target_modules=QVD)),
    Case("oft", _config("OFTConfig", r=0, oft_block_size=16, target_modules=QVD)),
    Case("osf", _config("OSFConfig", target_modules=QVD, effective_rank=16)),
    Case("peanut", _config("PeanutConfig", r=4, target_modules=QVD)),
    Case("psoft", _config("PsoftConfig", r=4, target_modules=QVD)),
    Case("pvera", _config("PveraConfig", r=8, target_modules=["q_proj"]), noise=1.0),
    Case("randlora", _config("RandLoraConfig", r=4, target_modules=["q_proj"])),
    Case("road", _config("RoadConfig", group_size=16, target_modules=QVD)),
    Case("shira", _config("ShiraConfig", r=4, target_modules=QVD)),
    Case("supertuning", _config("SupertuningConfig", target_modules=QVD)),
    Case("tinylora", _config("TinyLoraConfig", r=4, target_modules=QVD)),
    Case("trainable_tokens", _config("TrainableTokensConfig", token_indices=list(range(3, 60, 4)))),
    Case("unilora", _config("UniLoraConfig", r=4, target_modules=["q_proj", "v_proj"])),
    Case("vblora", _config("VBLoRAConfig", r=4, num_vectors=16, vector_length=16, target_modules=["q_proj", "v_proj"])),
    Case("vera", _config("VeraConfig", r=8, target_modules=["q_proj"]), noise=1.0),
    Case("waveft", _config("WaveFTConfig", n_frequency=50, target_modules=QVD)),
)


_CLASSIFIER = ["classifier"]
_EMBEDDED = ["embed_tokens", "q_proj"]
OTHERS = (
    # biases, norms with biases, heads of their own
    Case("glora", _config("GloraConfig", r=4, target_modules=["query", "dense"]), "bert"),
    Case("hra", _config("HRAConfig", r=4, target_modules=["key"], bias="all"), "bert"),
    Case("ia3", _config("IA3Config", target_modules=["value", "dense"], feedforward_modules=[]), "bert", noise=0.5),
    Case("ln_tuning", _config("LNTuningConfig", target_modules=["LayerNorm"], modules_to_save=_CLASSIFIER), "bert"),
    Case("loha", _config("LoHaConfig", r=2, target_modules=["query"], modules_to_save=_CLASSIFIER), "bert"),
    # GPT-2's Conv1D, with biases
    Case("adalora", _config("AdaLoraConfig", init_r=4, target_modules=["c_attn"], total_step=10), "gpt2", noise=0.2),
    Case(
        "fourierft", _config("FourierFTConfig", n_frequency=50, target_modules=["c_attn"], fan_in_fan_out=True), "gpt2"
    ),
    Case("ia3", _config("IA3Config", target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"]), "gpt2"),
    Case("vera", _config("VeraConfig", r=8, target_modules=["c_attn"]), "gpt2", noise=1.0),
    # embeddings, tied to the head
    Case("hira", _config("HiraConfig", r=4, target_modules=_EMBEDDED), "llama-tied", noise=0.3),
    Case("oft", _config("OFTConfig", r=0, oft_block_size=8, target_modules=_EMBEDDED), "llama-tied"),
    Case("tinylora", _config("TinyLoraConfig", r=4, target_modules=_EMBEDDED), "llama-tied"),
    Case("trainable_tokens", _config("TrainableTokensConfig", token_indices=list(range(3, 60, 4))), "llama-tied"),
    # convolutions with strides and padding
    Case("hira", _config("HiraConfig", r=4, target_modules=["convolution"]), "resnet", noise=0.3),
    Case("hra", _config("HRAConfig", r=4, target_modules=["convolution"]), "resnet"),
    Case("ia3", _config("IA3Config", target_modules=["convolution"], feedforward_modules=[]), "resnet"),
    Case("loha", _config("LoHaConfig", r=3, target_modules=["convolution"]), "resnet"),
    Case("lokr", _config("LoKrConfig", r=3, target_modules=["convolution"]), "resnet"),
)


def save(case: Case, base: Path, folder: Path, seed: int) -> Path:
    """Let peft put an adapter on the base, move every trained number, and save it; return its folder."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(base_model(case.model, base), case.config())
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(case.noise * torch.randn_like(parameter))
        tuned.save_pretrained(folder)
    return folder
