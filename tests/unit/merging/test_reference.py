"""The reference is peft's own unmerged forward, with every tensor of the file proven to be in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

from edgeadapt.adapters import read_adapters, resolve
from edgeadapt.errors import BaseModelError, MergeError
from edgeadapt.merging.merge import check_merge, merge
from edgeadapt.merging.modules import target_modules
from edgeadapt.merging.reference import _own_weights, adapted_module, model_outputs, reference_outputs

from .conftest import cases_for, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def digests(base):
    return {path: module.digest for path, module in target_modules(base.module).items()}


def by_peft_alone(base, folder, cases):
    """What a user of peft sees, on a copy of the base with memory of its own."""
    model = PeftModel.from_pretrained(_own_weights(base), str(folder)).eval()
    with torch.no_grad():
        return [model(**case).logits.numpy() for case in cases]


def test_outputs_are_peft_s_own(base_of, tmp_path):
    base = base_of("llama-tied")
    cases = cases_for(base)
    config = {"target_modules": ["q_proj", "embed_tokens"], "r": 4, "task_type": "CAUSAL_LM"}
    folder = save_adapter(_own_weights(base), tmp_path / "a", **config)
    other = save_adapter(_own_weights(base), tmp_path / "b", seed=1, target_modules=["v_proj"], r=2)
    adapters = [read_adapters(folder)[0], read_adapters(other)[0]]
    outputs = reference_outputs(base, adapters, cases)
    assert list(outputs) == [None, "a", "b"]
    for name, path in (("a", folder), ("b", other)):
        for want, got in zip(by_peft_alone(base, path, cases), outputs[name], strict=True):
            assert list(got) == ["logits"]
            assert got["logits"].dtype == np.float32
            np.testing.assert_array_equal(want, got["logits"])
    assert not np.array_equal(outputs["a"][0]["logits"], outputs["b"][0]["logits"])


def test_the_base_is_left_as_it_was(base_of, adapt):
    base = base_of("bert-classifier")
    before, flags = digests(base), [p.requires_grad for p in base.module.parameters()]
    biases = {n: p.clone() for n, p in base.module.named_parameters() if n.endswith("bias")}
    classes = [type(module) for module in base.module.modules()]
    adapter = adapt("bert-classifier", target_modules=["query"], r=2, bias="all", task_type="SEQ_CLS")
    reference_outputs(base, [adapter], cases_for(base))
    assert digests(base) == before
    assert all(torch.equal(p, biases[n]) for n, p in base.module.named_parameters() if n.endswith("bias"))
    assert [type(module) for module in base.module.modules()] == classes
    assert [p.requires_grad for p in base.module.parameters()] == flags == [False] * len(flags)
    assert not base.module.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.module.modules())


def test_an_initialization_that_rewrites_the_base_does_not_reach_it(base_of, tmp_path):
    """PiSSA takes its start out of the base's weights, in place."""
    base = base_of("llama")
    before = digests(base)
    folder = save_adapter(_own_weights(base), tmp_path / "p", target_modules=["q_proj"], r=2, init_lora_weights="pissa")
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter = read_adapters(save_adapter(_own_weights(base), tmp_path / "q", target_modules=["q_proj"], r=2))[0]
    # read_adapters may refuse PiSSA; the reference must be safe whoever asks.
    (adapter.path / "adapter_config.json").write_text(json.dumps(config))
    adapted_module(base, adapter)
    assert digests(base) == before


def rewrite(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize("prefix", ["", "module.base_model.model.", "base_model.model._orig_mod."])
def test_foreign_keys_are_loaded_under_their_normal_names(prefix, base_of, tmp_path):
    base = base_of("llama")
    cases = cases_for(base)
    folder = save_adapter(_own_weights(base), tmp_path / "a", target_modules=["q_proj", "down_proj"], r=4)
    want = by_peft_alone(base, folder, cases)
    rewrite(folder, lambda tensors: {prefix + key.removeprefix("base_model.model."): v for key, v in tensors.items()})
    got = reference_outputs(base, read_adapters(folder), cases)["a"]
    for one, other in zip(want, got, strict=True):
        np.testing.assert_array_equal(one, other["logits"])


def test_an_adapter_named_like_a_path_segment_keeps_all_its_layers(base_of, tmp_path):
    """peft drops the keys of layer 1 when it loads an adapter under the name "1"."""
    base = base_of("llama")
    cases = cases_for(base)
    folder = save_adapter(_own_weights(base), tmp_path / "1", target_modules=["q_proj"], r=4)
    want = by_peft_alone(base, folder, cases)
    adapter = read_adapters(folder)[0]
    assert adapter.name == "1"
    got = reference_outputs(base, [adapter], cases)["1"]
    np.testing.assert_array_equal(want[1], got[1]["logits"])
    check_merge(base, adapter, merge(base, resolve(adapter, base.modules)), cases, 1e-5)


def test_a_head_with_another_number_of_classes(base_of, folder_of, tmp_path):
    base = base_of("bert-classifier")
    cases = cases_for(base)
    own = AutoModelForSequenceClassification.from_pretrained(
        folder_of("bert-classifier"), num_labels=7, ignore_mismatched_sizes=True
    )
    folder = save_adapter(own, tmp_path / "seven", target_modules=["query"], r=2, task_type="SEQ_CLS")
    adapter = read_adapters(folder)[0]
    outputs = reference_outputs(base, [adapter], cases)
    assert outputs[None][1]["logits"].shape == (3, 3)
    assert outputs["seven"][1]["logits"].shape == (3, 7)
    merged = merge(base, resolve(adapter, base.modules))
    check_merge(base, adapter, merged, cases, 1e-5)
    assert merged.config.num_labels == 7
    assert base.config.num_labels == base.module.classifier.out_features == 3


def in_memory(adapter):
    """Return the adapter with its tensors read, so that its file can be changed."""
    tensors = {}
    for key, ref in adapter.tensors.items():
        value = ref.read()
        tensors[key] = type(ref)(ref.key, ref.shape, ref.dtype, ref.file, lambda value=value: value)
    return type(adapter)(**{**vars(adapter), "tensors": tensors})


def refuse(base, adapter, cases=None):
    with pytest.raises(MergeError) as caught:
        reference_outputs(base, [adapter] if not isinstance(adapter, list) else adapter, cases or cases_for(base))
    return str(caught.value)


def test_an_incomplete_load_is_refused(base_of, tmp_path):
    """peft itself only warns, and gives the base's outputs at that module."""
    base = base_of("llama")
    folder = save_adapter(_own_weights(base), tmp_path / "a", target_modules=["q_proj"], r=2)
    adapter = in_memory(read_adapters(folder)[0])
    gone = "model.layers.1.self_attn.q_proj.lora_B.weight"
    whole = load_file(folder / "adapter_model.safetensors")

    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != f"base_model.model.{gone}"})
    tensors = {key: ref for key, ref in adapter.tensors.items() if key != gone}
    assert refuse(base, type(adapter)(**{**vars(adapter), "tensors": tensors})) == (
        "peft's copy of adapter 'a' is not the saved one: 1 tensors are not in its file: "
        f"{gone}\n"
        "Hint: the adapter's files do not belong together, or not to this base; save it again with peft"
    )

    save_file(whole, folder / "adapter_model.safetensors")
    again = read_adapters(folder)[0]
    strange = {**again.tensors, "model.layers.7.self_attn.q_proj.lora_A.weight": next(iter(again.tensors.values()))}
    assert "1 tensors were not loaded: model.layers.7.self_attn.q_proj.lora_A.weight" in refuse(
        base, type(again)(**{**vars(again), "tensors": strange})
    )


def test_a_changed_value_is_noticed(base_of, tmp_path):
    base = base_of("llama")
    folder = save_adapter(_own_weights(base), tmp_path / "a", target_modules=["q_proj"], r=2)
    adapter = read_adapters(folder)[0]
    key, ref = next(iter(adapter.tensors.items()))
    value = ref.read()
    lied = type(ref)(ref.key, ref.shape, ref.dtype, ref.file, lambda: value + 1)
    assert f"1 tensors have other values: {key}" in refuse(
        base, type(adapter)(**{**vars(adapter), "tensors": {**adapter.tensors, key: lied}})
    )


def test_other_refusals(base_of, adapt):
    base = base_of("llama")
    adapter = adapt("llama", target_modules=["q_proj"], r=2)
    other = type(adapter)(**{**vars(adapter), "layout": "adapters"})
    assert refuse(base, other) == (
        "adapter 'adapter' is in the layout 'adapters', whose library cannot be run here\n"
        "Hint: only adapters saved by peft or AdapterHub have a reference"
    )
    assert refuse(base, [adapter, adapter]) == (
        "two adapters have the name 'adapter'\nHint: give each a name of its own"
    )
    assert refuse(base_of("bert"), adapter, cases_for(base_of("bert"))).startswith(
        "peft cannot load adapter 'adapter' on this base: NoMatchingPeftModuleError: Target modules {'q_proj'} not"
    )
    with pytest.raises(BaseModelError) as caught:
        model_outputs(base, base.module, {"pixel_values": torch.ones(1, 3)})
    assert caught.value.message.startswith("llama cannot run on pixel_values [1, 3]: ")
    assert caught.value.hint == "give inputs that the model's forward takes"


def test_outputs_by_name(base_of):
    net, bert, t5 = base_of("conv-net"), base_of("bert"), base_of("t5")
    assert list(model_outputs(net, net.module, cases_for(net)[0])) == ["scores"]
    assert list(model_outputs(bert, bert.module, cases_for(bert)[0])) == ["last_hidden_state", "pooler_output"]
    assert list(model_outputs(t5, t5.module, cases_for(t5)[0])) == ["logits", "encoder_last_hidden_state"]
    wrong = type(net)(**{**vars(net), "output_names": ("one", "two")})
    with pytest.raises(BaseModelError) as caught:
        model_outputs(wrong, wrong.module, cases_for(net)[0])
    assert str(caught.value) == (
        "conv-net has 1 outputs, but 2 names: one, two\nHint: give one output name for each output of the forward"
    )


def test_several_adapters_in_one_folder(base_of, tmp_path):
    base = base_of("llama")
    cases = cases_for(base)
    model = get_peft_model(_own_weights(base), LoraConfig(target_modules=["q_proj"], r=2), adapter_name="one")
    model.add_adapter("two", LoraConfig(target_modules=["v_proj"], r=3))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "both")
    adapters = read_adapters(tmp_path / "both")
    outputs = reference_outputs(base, adapters, cases)
    assert len(outputs) == 3
    for name in ("one", "two"):
        model.set_adapter(name)
        key = next(key for key in outputs if key and key.endswith(name))
        with torch.no_grad():
            want = model.eval()(**cases[1]).logits.numpy()
        np.testing.assert_allclose(outputs[key][1]["logits"], want, rtol=0, atol=1e-6)
