"""A merge equals the unmerged forward of peft, and leaves the base alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeadapt.adapters import resolve
from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate
from edgeadapt.errors import MergeError
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.fingerprint import module_digest
from edgeadapt.merging.load import base_from_module
from edgeadapt.merging.merge import check_merge, merge
from edgeadapt.merging.modules import target_modules
from edgeadapt.merging.reference import model_outputs, reference_outputs

from .conftest import cases_for

ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# float32 sums of these depths in another order differ by 1e-6 of the largest output.
TOLERANCE = 1e-5

CASES = {
    "lora": ("llama", {"target_modules": LINEAR, "r": 4, "lora_alpha": 8}),
    "rslora": ("llama", {"target_modules": ATTENTION, "r": 4, "lora_alpha": 8, "use_rslora": True}),
    "dora": ("llama", {"target_modules": LINEAR, "r": 4, "use_dora": True}),
    "patterns": ("llama", {"target_modules": ATTENTION, "r": 4, "rank_pattern": {"q_proj": 2},
                           "alpha_pattern": {"v_proj": 3}}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "tied embedding": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "tied head": ("llama-tied", {"target_modules": ["lm_head", "q_proj"], "r": 4}),
    "tied, both": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"], "r": 4}),
    "tied, head saved": ("llama-tied", {"target_modules": ATTENTION, "r": 4, "modules_to_save": ["lm_head"]}),
    "untied head": ("llama", {"target_modules": ["lm_head"], "r": 4}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True, "use_dora": True}),
    "gpt2 tied head": ("gpt2", {"target_modules": ["lm_head", "c_attn"], "r": 4}),
    "classifier": ("bert-classifier", {"target_modules": ["query", "value"], "r": 4, "task_type": "SEQ_CLS"}),
    "biases": ("bert-classifier", {"target_modules": ["query", "value"], "r": 4, "bias": "all"}),
    "lora biases": ("bert-classifier", {"target_modules": ["query", "dense"], "r": 4, "bias": "lora_only"}),
    "lora_bias": ("bert-classifier", {"target_modules": ["query", "value"], "r": 4, "lora_bias": True}),
    "dora with bias": ("bert-classifier", {"target_modules": ["query", "dense"], "r": 4, "use_dora": True}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi", "wo"], "r": 4}),
    "t5 tied head": ("t5", {"target_modules": ["lm_head", "q"], "r": 4}),
    "convolutions": ("conv-net", {"target_modules": ["stem", "point", "head"], "r": 4}),
    "convolutions dora": ("conv-net", {"target_modules": ["stem", "point"], "r": 4, "use_dora": True}),
    "resnet": ("resnet", {"target_modules": ["convolution"], "r": 2, "modules_to_save": ["classifier"]}),
}  # fmt: skip


def effect(outputs: dict, name: str) -> float:
    pairs = zip(outputs[None], outputs[name], strict=True)
    return max(float(np.abs(a[key] - b[key]).max() / np.abs(a[key]).max()) for a, b in pairs for key in a)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own remarks while it trains and saves
@pytest.mark.parametrize("case", CASES)
def test_merged_equals_unmerged_and_the_base_stays(case, base_of, adapt):
    name, config = CASES[case]
    base = base_of(name)
    cases = cases_for(base)
    adapter = adapt(name, **config)
    before = [model_outputs(base, base.module, inputs) for inputs in cases]

    merged = merge(base, resolve(adapter, base.modules))
    error = check_merge(base, adapter, merged, cases, TOLERANCE)

    assert error <= TOLERANCE
    outputs = reference_outputs(base, [adapter], cases)
    assert effect(outputs, adapter.name) > 1e-2
    for old, new, base_outputs in zip(
        before, [model_outputs(base, base.module, c) for c in cases], outputs[None], strict=True
    ):
        for key in old:
            np.testing.assert_array_equal(old[key], new[key])
            np.testing.assert_array_equal(old[key], base_outputs[key])
    fresh = target_modules(base.module)
    assert {p: m.digest for p, m in fresh.items()} == {p: m.digest for p, m in base.modules.items()}
    described = target_modules(merged.module)
    assert described == dict(merged.modules)
    assert described != fresh


def test_an_untouched_weight_is_shared_and_a_changed_one_is_not(base_of, adapt):
    base = base_of("llama")
    merged = merge(base, resolve(adapt("llama", target_modules=["q_proj"], r=2), base.modules))
    same = "model.layers.0.mlp.up_proj.weight"
    other = "model.layers.0.self_attn.q_proj.weight"
    assert merged.module.get_parameter(same).data_ptr() == base.module.get_parameter(same).data_ptr()
    assert merged.module.get_parameter(other).data_ptr() != base.module.get_parameter(other).data_ptr()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "target"), [("llama-tied", "lm_head"), ("llama-tied", "embed_tokens"), ("t5", "lm_head")]
)
def test_a_tied_weight_is_untied_for_good(name, target, base_of, adapt):
    base = base_of(name)
    cases = cases_for(base)
    merged = merge(base, resolve(adapt(name, target_modules=[target], r=2), base.modules))
    expected = [model_outputs(merged, merged.module, inputs) for inputs in cases]
    embedding, head = merged.module.get_input_embeddings(), merged.module.get_output_embeddings()
    original = base.module.get_input_embeddings().weight
    assert base.module.get_output_embeddings().weight is original
    changed, kept = (head, embedding) if target == "lm_head" else (embedding, head)
    assert not torch.equal(changed.weight, original)
    assert torch.equal(kept.weight, original)

    merged.module.tie_weights()

    for inputs, want in zip(cases, expected, strict=True):
        np.testing.assert_array_equal(model_outputs(merged, merged.module, inputs)["logits"], want["logits"])
    assert base.config.tie_word_embeddings
    if name != "t5":  # T5's own forward scales the hidden states by this entry
        assert not merged.config.tie_word_embeddings
        assert b'"tie_word_embeddings": false' in merged.assets["config.json"]


class Twice(torch.nn.Module):
    """One module called twice; with `alias`, by two names."""

    def __init__(self, *, alias: bool) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = self.first if alias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second or self.first)(torch.tanh(self.first(x)))


@pytest.mark.parametrize("alias", [False, True])
def test_a_module_that_is_used_twice_is_changed_once(alias, adapt):
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    base = base_from_module(Twice(alias=alias), name="twice", example_inputs={"x": x}, dynamic_axes={})
    assert list(base.modules) == ["first"]
    adapter = adapt(base, target_modules=["first"], r=2)
    resolved = resolve(adapter, base.modules)
    merged = merge(base, resolved)
    update = resolved.sites["first"]
    want = base.module.first.weight.numpy() + (update.a @ update.b).T
    np.testing.assert_allclose(merged.module.first.weight.numpy(), want, rtol=0, atol=1e-6)
    if alias:  # peft wraps the first name only, so its forward differs from that of the one merged module
        assert merged.module.second is merged.module.first
        with pytest.raises(MergeError, match="did not reproduce its unmerged outputs"):
            check_merge(base, adapter, merged, [{"x": x}], TOLERANCE)
    else:
        check_merge(base, adapter, merged, [{"x": x}], TOLERANCE)


def test_a_new_bias_and_a_gain_are_folded(base_of):
    base = base_of("llama")
    path = "model.layers.1.self_attn.o_proj"
    gain, offset = np.linspace(0.5, 2, 32, dtype=np.float32), np.linspace(-1, 1, 32, dtype=np.float32)
    resolved = ResolvedAdapter("x", "lora", {path: SiteUpdate(gain=gain, offset=offset)}, {})
    x = torch.randn(4, 32)
    merged = merge(base, resolved)
    want = base.module.get_submodule(path)(x) * torch.from_numpy(gain) + torch.from_numpy(offset)
    torch.testing.assert_close(merged.module.get_submodule(path)(x), want)
    assert base.module.get_submodule(path).bias is None
    assert merged.modules[path].has_bias
    assert not base.modules[path].has_bias


@pytest.mark.parametrize(
    ("name", "path", "shape"),
    [("bert", "embeddings.LayerNorm", (4, 32)), ("llama", "model.norm", (4, 32)), ("conv-net", "norm", (4, 8, 3, 3))],
)
def test_a_norm_takes_a_gain(name, path, shape, base_of):
    base = base_of(name)
    gain = np.linspace(0.5, 2, shape[1], dtype=np.float32)
    merged = merge(base, ResolvedAdapter("x", "lora", {path: SiteUpdate(gain=gain)}, {}))
    x = torch.randn(*shape)
    want = base.module.get_submodule(path)(x) * torch.from_numpy(gain).reshape(-1, *[1] * (len(shape) - 2))
    torch.testing.assert_close(merged.module.get_submodule(path)(x), want)


@pytest.mark.parametrize(
    ("name", "path", "sizes"),
    [("llama", "model.layers.1.mlp.down_proj", (48, 32)), ("gpt2", "transformer.h.1.mlp.c_proj", (128, 32))],
)
def test_a_gain_of_the_inputs_is_folded(name, path, sizes, base_of):
    """The low-rank term beside it reads the inputs as they are."""
    base, rng = base_of(name), np.random.default_rng(0)
    inputs, outputs = sizes
    update = SiteUpdate(
        *(rng.standard_normal(shape).astype(np.float32) for shape in ((inputs, 2), (2, outputs), outputs, outputs)),
        input_gain=np.linspace(0.5, 2, inputs, dtype=np.float32),
    )
    x = torch.randn(4, inputs)
    merged = merge(base, ResolvedAdapter("x", "ia3", {path: update}, {}))
    a, b, gain, offset, input_gain = (torch.from_numpy(value) for value in update.terms.values())
    want = (base.module.get_submodule(path)(x * input_gain) + x @ a @ b) * gain + offset
    torch.testing.assert_close(merged.module.get_submodule(path)(x), want, rtol=1e-5, atol=1e-4)


def test_an_embedding_takes_gain_and_offset(base_of):
    base = base_of("llama")
    gain, offset = np.linspace(0.5, 2, 32, dtype=np.float32), np.linspace(-1, 1, 32, dtype=np.float32)
    update = SiteUpdate(gain=gain, offset=offset)
    merged = merge(base, ResolvedAdapter("x", "lora", {"model.embed_tokens": update}, {}))
    ids = torch.tensor([[3, 5]])
    want = base.module.model.embed_tokens(ids) * torch.from_numpy(gain) + torch.from_numpy(offset)
    torch.testing.assert_close(merged.module.model.embed_tokens(ids), want)


def test_the_sum_is_rounded_once():
    """W + AB is the float32 nearest to the exact value, not a float32 sum of a float32 product."""
    linear = torch.nn.Linear(3, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    base = base_from_module(
        torch.nn.Sequential(linear), name="one", example_inputs={"input": torch.ones(1, 3)}, dynamic_axes={}
    )
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((3, 5), (5, 2)))
    merged = merge(base, ResolvedAdapter("x", "lora", {"0": SiteUpdate(a=a, b=b)}, {}))
    exact = linear.weight.detach().double().numpy() + (a.astype(np.float64) @ b.astype(np.float64)).T
    np.testing.assert_array_equal(merged.module[0].weight.numpy(), exact.astype(np.float32))
    assert merged.modules["0"].digest == module_digest(exact.astype(np.float32))


def test_a_head_of_other_size_replaces_the_base_s(base_of, folder_of, adapt):
    base = base_of("bert-classifier")
    weight, bias = np.full((5, 32), 0.1, np.float32), np.arange(5, dtype=np.float32)
    merged = merge(base, ResolvedAdapter("x", "lora", {}, {"classifier.weight": weight, "classifier.bias": bias}))
    assert merged.module.classifier.out_features == 5
    assert merged.config.num_labels == 5
    assert base.config.num_labels == 3
    assert model_outputs(merged, merged.module, cases_for(base)[0])["logits"].shape == (1, 5)
    assert merged.modules["classifier"].weight_shape == (5, 32)


def message(base: BaseModel, sites: dict, replaced: dict | None = None) -> str:
    with pytest.raises(MergeError) as caught:
        merge(base, ResolvedAdapter("calm", "lora", sites, replaced or {}))
    return str(caught.value)


def test_refusals(base_of):
    llama, net = base_of("llama"), base_of("conv-net")
    assert message(llama, {}) == (
        "adapter 'calm' has nothing to merge: it changes no module and no parameter\n"
        "Hint: check that the adapter was saved after training"
    )
    path = "model.layers.0.self_attn.q_proj"
    zeros = SiteUpdate(a=np.ones((32, 2), np.float32), b=np.zeros((2, 32), np.float32))
    assert message(llama, {path: zeros}) == (
        "merging adapter 'calm' leaves every weight of llama as it was\n"
        "Hint: the adapter is untrained (its B matrices are zero), or too small for float32"
    )
    assert message(llama, {"model.layers.9.mlp": zeros}) == (
        "llama has no module 'model.layers.9.mlp', which adapter 'calm' changes\n"
        "Hint: give the base that the adapter was trained on"
    )
    wide = SiteUpdate(a=np.ones((16, 2), np.float32), b=np.ones((2, 32), np.float32))
    assert message(llama, {path: wide}) == (
        "A (16, 2) and B (2, 32) do not fit model.layers.0.self_attn.q_proj, a linear module with weight (32, 32)\n"
        "Hint: give the base that the adapter was trained on"
    )
    assert message(llama, {path: SiteUpdate(a=np.ones((32, 2), np.float32))}) == (
        "A without B do not fit model.layers.0.self_attn.q_proj, a linear module with weight (32, 32)\n"
        "Hint: give the base that the adapter was trained on"
    )
    huge = SiteUpdate(a=np.full((32, 2), 1e30, np.float32), b=np.full((2, 32), 1e30, np.float32))
    assert message(llama, {path: huge}) == (
        "merging adapter 'calm' makes model.layers.0.self_attn.q_proj.weight infinite or NaN\n"
        "Hint: the adapter is damaged"
    )
    assert message(llama, {"model.embed_tokens": SiteUpdate(input_gain=np.ones(32, np.float32))}).startswith(
        "an input gain of shape (32,) do not fit model.embed_tokens, a embedding module with weight "
    )
    grouped = SiteUpdate(a=np.ones((4, 3, 3, 3), np.float32), b=np.ones((12, 4, 1, 1), np.float32))
    assert message(net, {"depth": grouped}) == (
        "the update of depth cannot be merged: a convolution with 4 groups cannot hold a term that mixes its groups\n"
        "Hint: export without merging (swappable)"
    )
    offset = SiteUpdate(offset=np.ones(32, np.float32))
    assert message(llama, {"model.norm": offset}) == (
        "the update of model.norm cannot be merged: LlamaRMSNorm has no bias for the offset\n"
        "Hint: export without merging (swappable)"
    )
    assert message(llama, {}, {"classifier.weight": np.ones((2, 32), np.float32)}) == (
        "LlamaForCausalLM has no parameter 'classifier.weight'\n"
        "Hint: the adapter was made for another architecture; give the base that it was trained on"
    )
    assert message(llama, {}, {"lm_head.weight": np.ones((64, 16), np.float32)}) == (
        "the new lm_head.weight has shape (64, 16), the base's has (64, 32)\n"
        "Hint: give the base that the adapter was trained on"
    )


def test_a_gemma_norm_takes_no_gain():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    base = base_from_module(
        torch.nn.Sequential(GemmaRMSNorm(8)), name="g", example_inputs={"input": torch.ones(1, 8)}, dynamic_axes={}
    )
    assert message(base, {"0": SiteUpdate(gain=np.full(8, 2, np.float32))}) == (
        "the update of 0 cannot be merged: the outputs of GemmaRMSNorm are not proportional to its weight\n"
        "Hint: export without merging (swappable)"
    )


def test_a_wrong_merge_is_caught(base_of, adapt):
    base = base_of("llama")
    adapter = adapt("llama", target_modules=["q_proj", "up_proj"], r=2)
    resolved = resolve(adapter, base.modules)
    cut = ResolvedAdapter(resolved.name, resolved.kind, dict(list(resolved.sites.items())[:-1]), {})
    with pytest.raises(MergeError, match=r"did not reproduce its unmerged outputs: output 'logits' of case \d differs"):
        check_merge(base, adapter, merge(base, cut), cases_for(base), TOLERANCE)
    with pytest.raises(MergeError, match="there are no cases to check the merge with"):
        check_merge(base, adapter, merge(base, resolved), [], TOLERANCE)
