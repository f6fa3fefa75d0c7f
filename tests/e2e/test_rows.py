"""Rows of one batch with adapters of their own, in real exports: as each text alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig

from edgeadapt.bundle import Bundle
from edgeadapt.merging.fingerprint import stamp_base
from edgeadapt.merging.load import load_base_model
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from edgeadapt.runtime.rowwise import RowBindings
from edgeadapt.runtime.step import run_step
from tests.e2e.conftest import Tiny
from tests.e2e.reference import CLOSE
from tests.e2e.tiny import DECODER, save_adapter

GetTiny = Callable[[str], Tiny]
TASK = "text-generation"


@pytest.fixture
def with_biases(tmp_path: Path) -> Callable[..., tuple[Path, ...]]:
    """Return a function from a base to two adapters that move all of its biases, those of its norms too."""

    def make(model_class: Any, base: Path, target: str) -> tuple[Path, ...]:
        folders = []
        for index, rank in enumerate((2, 5)):
            torch.manual_seed(index)
            config = LoraConfig(r=rank, bias="all", target_modules=[target])
            loaded = model_class.from_pretrained(base)
            folders.append(save_adapter(loaded, config, tmp_path / f"biases{index}"))
            stamp_base(folders[-1], load_base_model(base, task=TASK))
        return tuple(folders)

    return make


def _check_rows(bundle: Bundle) -> None:
    """Compare logits of rows of several adapters, in a prompt and in steps, with each of them alone."""
    names = bundle.adapter_names
    choices = [names[0], None, {names[0]: 0.5, names[1]: 0.25}, *reversed(names), names[0]]
    rng = np.random.default_rng(5)
    prompts, steps = rng.integers(3, 128, (len(choices), 6)), rng.integers(3, 128, (3, len(choices), 1))
    lengths = np.array([6, 2, 5, 1, 6, 3, 4, 6][: len(choices)])
    with open_session(bundle, threads=1) as session:
        spec = session.require_decoder()
        rows = RowBindings(session, len(choices))
        keys = [session.active.key_of(choice) for choice in choices]
        binding = rows.several(keys)
        assert rows.obstacle is None
        assert binding is not None
        cache = session.new_cache(len(choices), 16)
        found = [run_step(binding, spec, prompts, cache, lengths=lengths, logits="last")]
        found += [run_step(binding, spec, ids, cache, logits="last") for ids in steps]
        for row, choice in enumerate(choices):
            session.use(choice)
            alone = session.new_cache(1, 16)
            for ids, logits in zip(
                [prompts[row : row + 1, : lengths[row]], *steps[:, row : row + 1]], found, strict=True
            ):
                expected = session.step(ids, alone, logits="last")[0, -1]
                assert np.abs(logits[row, -1] - expected).max() <= CLOSE * np.abs(expected).max()
        last = np.stack([logits[:, -1] for logits in found]).swapaxes(0, 1)
        assert all(np.abs(last[0] - last[row]).max() > 1e-3 for row in range(1, len(choices) - 1))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_modules_of_gpt2_take_an_adapter_per_row(
    quantize: str, tiny: GetTiny, with_biases: Callable[..., Any], tmp_path: Path, traced_once: None
) -> None:
    """Conv1D with A and B of different ranks and modules, layer norms with offsets; ragged prompts, then steps."""
    base = tiny("gpt2").base
    folders = (*tiny("gpt2").adapters, *with_biases(transformers.GPT2LMHeadModel, base, "c_fc"))
    bundle = export_bundle(Recipe(folders, str(base), tmp_path / "out.bundle", task=TASK, quantize=quantize))
    terms = {(slot.type, term) for slot in bundle.manifest.slots for term in slot.inputs}
    assert terms == {("conv1d", "a"), ("conv1d", "b"), ("conv1d", "offset"), ("norm", "offset")}
    _check_rows(bundle)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_joined_modules_take_an_adapter_per_row(
    quantize: str, tiny: GetTiny, tmp_path: Path, traced_once: None
) -> None:
    model = tiny("llama")
    bundle = export_bundle(
        Recipe(model.adapters, str(model.base), tmp_path / "out.bundle", task=TASK, quantize=quantize)
    )
    assert bool(bundle.manifest.joined) == (quantize == "int8")
    _check_rows(bundle)


def test_norms_of_heads_apart_take_one_adapter_for_all_rows(with_biases: Callable[..., Any], tmp_path: Path) -> None:
    """Phi's norms of queries and keys act on [batch, seq, heads, dim]: a first axis of offsets would meet `seq`."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**{**DECODER, **heads}, qk_layernorm=True))
    model.save_pretrained(tmp_path / "phi")
    folders = with_biases(transformers.PhiForCausalLM, tmp_path / "phi", "dense")
    bundle = export_bundle(Recipe(folders, str(tmp_path / "phi"), tmp_path / "out.bundle", task=TASK, quantize="none"))
    with open_session(bundle, threads=1) as session:
        rows = RowBindings(session, 2)
        assert rows.several([session.active.key_of(name) for name in bundle.adapter_names]) is None
        slot = "model.layers.0.self_attn.k_layernorm.offset"
        assert rows.obstacle == f"this bundle's graph takes one {slot!r} for all rows; another export may take more"
