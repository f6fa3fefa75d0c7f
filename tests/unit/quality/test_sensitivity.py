"""What samples say of an adapter's ranks, on a real peft adapter over a tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate
from edgeadapt.adapters.prune import spectrum
from edgeadapt.adapters.read import read_adapters
from edgeadapt.adapters.resolve import resolve
from edgeadapt.errors import ExportError
from edgeadapt.export.sensitivity import collect_sensitivity
from edgeadapt.merging.load import base_from_module
from edgeadapt.merging.merge import merge
from edgeadapt.quality.compare import kl_divergence


class _Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, 6)
        self.conv = torch.nn.Conv2d(6, 8, (1, 3), padding=(0, 1))
        self.head = torch.nn.Linear(8, 5)
        self.output = "logits"

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.conv(self.embed(input_ids).transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        return {self.output: self.head(torch.relu(x))}


def _base(module, ids):
    return base_from_module(module.eval(), name="tiny", example_inputs={"input_ids": ids}, dynamic_axes={})


def _case(module, targets, tmp_path: Path, **config):
    """Return (base, resolved adapter, cases)."""
    ids = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    base = _base(module, ids)
    torch.manual_seed(1)
    tuned = get_peft_model(module, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **config))
    tuned.save_pretrained(tmp_path / "a")
    tuned.unload()
    (adapter,) = read_adapters(tmp_path / "a")
    return base, resolve(adapter, base.modules, base_name="tiny"), [{"input_ids": ids}, {"input_ids": ids.flip(0, 1)}]


def _llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _with_adapter(base, adapter, case):
    """Return logits with the adapter applied by hooks."""
    handles = []
    for path, update in adapter.sites.items():
        a, b = torch.from_numpy(update.a), torch.from_numpy(update.b)
        handles.append(
            base.module.get_submodule(path).register_forward_hook(lambda _m, args, y, a=a, b=b: y + args[0] @ a @ b)
        )
    with torch.no_grad():
        logits = base.module(**case).logits.numpy()
    for handle in handles:
        handle.remove()
    return logits


def test_the_cost_of_a_small_change_is_foretold(tmp_path):
    base, adapter, _ = _case(_llama(), ["q_proj", "down_proj"], tmp_path)
    many = [{"input_ids": torch.randint(0, 20, (8, 12), generator=torch.Generator().manual_seed(i))} for i in range(16)]
    found = collect_sensitivity(base, adapter, many)
    path = "model.layers.1.mlp.down_proj"
    expected = spectrum(adapter.sites[path], found[path]).kl.sum()

    # the whole branch at a tenth of its size: the cost of leaving it out is a hundredth
    update = adapter.sites[path]
    nearly = {**adapter.sites, path: dataclasses.replace(update, b=update.b * np.float32(0.9))}
    weaker = dataclasses.replace(adapter, sites=nearly)
    kl = np.mean([kl_divergence(_with_adapter(base, adapter, x), _with_adapter(base, weaker, x)).mean() for x in many])
    assert kl == pytest.approx(expected / 100, rel=0.4)


def test_moments_are_those_of_the_adapted_model_and_nothing_is_left_behind(tmp_path):
    base, adapter, cases = _case(_llama(), ["q_proj", "down_proj"], tmp_path)
    before = [parameter.requires_grad for parameter in base.module.parameters()]
    found = collect_sensitivity(base, adapter, cases)
    assert found.keys() == adapter.sites.keys()
    seen: list[torch.Tensor] = []
    path = "model.layers.1.mlp.down_proj"
    handle = base.module.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for case in cases:
        _with_adapter(base, adapter, case)
    handle.remove()
    h = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).numpy() @ adapter.sites[path].a
    np.testing.assert_allclose(found[path].moments, h.T @ h / len(h), rtol=1e-3, atol=1e-6)
    assert np.linalg.eigvalsh(found[path].gradients).min() > -1e-9
    assert np.trace(found[path].gradients) > 0
    assert [parameter.requires_grad for parameter in base.module.parameters()] == before
    assert not any(module._forward_hooks for module in base.module.modules())
    again = collect_sensitivity(base, adapter, cases)
    np.testing.assert_array_equal(found[path].gradients, again[path].gradients)


def test_a_gain_of_the_inputs_is_in_place(tmp_path):
    """As in a base whose weight is scaled so, but for the low-rank term, which reads the inputs as they are."""
    base, adapter, cases = _case(_llama(), ["q_proj", "down_proj"], tmp_path)
    path = "model.layers.1.mlp.down_proj"
    gain = np.linspace(0.2, 3, 24, dtype=np.float32)
    scaled = {**adapter.sites, path: dataclasses.replace(adapter.sites[path], input_gain=gain)}
    found = collect_sensitivity(base, dataclasses.replace(adapter, sites=scaled), cases)
    other = merge(base, ResolvedAdapter("gain", "ia3", {path: SiteUpdate(input_gain=gain)}, {}))
    expected, without = collect_sensitivity(other, adapter, cases), collect_sensitivity(base, adapter, cases)
    for site in adapter.sites:
        np.testing.assert_allclose(found[site].gradients, expected[site].gradients, rtol=1e-3, atol=1e-8)
    assert not np.allclose(found[path].gradients, without[path].gradients, rtol=1e-2)


def test_embeddings_and_convolutions_have_ranks_too(tmp_path):
    base, adapter, cases = _case(_Convolutions(), ["embed", "conv", "head"], tmp_path)
    found = collect_sensitivity(base, adapter, cases)
    assert set(found) == {"embed", "conv", "head"}
    ids = torch.cat([case["input_ids"] for case in cases]).numpy().reshape(-1)
    h = adapter.sites["embed"].a[ids]
    np.testing.assert_allclose(found["embed"].moments, h.T @ h / len(h), rtol=1e-4)
    for path, item in found.items():
        assert item.moments.shape == (4, 4)
        assert spectrum(adapter.sites[path], item).kl[0] > 0


def test_a_head_that_the_adapter_brings_is_in_place(tmp_path):
    base, adapter, cases = _case(_Convolutions(), ["conv"], tmp_path, modules_to_save=["head"])
    own = collect_sensitivity(base, adapter, cases)["conv"]

    zero = {name: np.zeros_like(value) for name, value in adapter.replaced.items()}
    assert zero
    silent = collect_sensitivity(base, dataclasses.replace(adapter, replaced=zero), cases)["conv"]
    assert np.trace(own.gradients) > 0
    assert np.trace(silent.gradients) == 0


def test_a_model_without_logits_is_refused(tmp_path):
    base, adapter, cases = _case(_Convolutions(), ["conv"], tmp_path)
    base.module.output = "features"
    with pytest.raises(ExportError) as caught:
        collect_sensitivity(base, adapter, cases)
    assert caught.value.message == (
        "prune_kl compares the model's distributions, and tiny gives no logits of two or more classes"
    )
    assert caught.value.hint == "leave prune_kl out"
