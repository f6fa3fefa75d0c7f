"""Completeness both ways, the right base, names that moved; and what is said of an adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from edgeadapt.adapters import default_head_size, describe, read_adapters, resolve, task_of
from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.adapters.selection import Move, find_move
from edgeadapt.errors import AdapterError

from .tiny import (
    attach,
    build,
    edit_config,
    edit_tensors,
    inputs_of,
    outputs,
    relative_error,
    resolved_values,
    save,
    target_modules,
)

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
RIGHT_BASE = "give the base that the adapter was trained on, loaded for the same task"
DAMAGED = "the file is damaged or incomplete: save the adapter again with peft's save_pretrained"
NO_NAME = "the adapter was trained on a base whose name was not saved, this is base 'tiny'"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "support", "llama", r=2, target_modules=["q_proj"])


@pytest.fixture
def modules() -> dict[str, TargetModule]:
    return target_modules(build("llama"))


def refusal(folder: Path, modules: dict[str, TargetModule]) -> tuple[str, str]:
    (adapter,) = read_adapters(folder)
    with pytest.raises(AdapterError) as caught:
        resolve(adapter, modules, base_name="tiny")
    start = f"adapter {adapter.name!r}: "
    assert caught.value.message.startswith(start)
    return caught.value.message.removeprefix(start), caught.value.hint


# Completeness


def test_a_selected_module_without_tensors(folder: Path, modules: dict[str, TargetModule]) -> None:
    """An adapter named like a part of a module's path makes peft drop that module's tensors in silence."""
    edit_tensors(folder, lambda tensors: {key: value for key, value in tensors.items() if Q1 not in key})
    assert refusal(folder, modules) == (
        f"no tensors for 1 of the 2 modules that target_modules selects: {Q1!r} ({NO_NAME})",
        f"{DAMAGED}, or {RIGHT_BASE}",
    )


def test_pefts_own_loss_of_tensors_is_found(tmp_path: Path, modules: dict[str, TargetModule]) -> None:
    """Saved by peft 0.21 beside an adapter named "1", the default adapter lacks every tensor of layer 1."""
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("1", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "two"))
    adapter = read_adapters(tmp_path / "two")[0]
    with pytest.raises(AdapterError, match="no tensors for 1 of the 2 modules"):
        resolve(adapter, modules)


def test_tensors_that_the_config_does_not_select(folder: Path, modules: dict[str, TargetModule]) -> None:
    edit_config(folder, layers_to_transform=[0])
    assert refusal(folder, modules) == (
        f"tensors for modules that the config does not select: {Q1!r}",
        "copy the adapter_config.json that was saved with these tensors",
    )


def test_nothing_selected(folder: Path, modules: dict[str, TargetModule]) -> None:
    edit_config(folder, target_modules=["c_attn"])
    assert refusal(folder, modules) == (
        "target_modules ['c_attn'] selects no module of base 'tiny'",
        RIGHT_BASE,
    )


def test_a_tensor_without_a_use(folder: Path, modules: dict[str, TargetModule]) -> None:
    key = "base_model.model.model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: {**tensors, key: torch.ones(24, 16)})
    assert refusal(folder, modules) == (
        f"tensors without a use in base 'tiny': {key!r} (module 'model.layers.0.mlp.up_proj' is there; {NO_NAME})",
        RIGHT_BASE,
    )


def test_a_head_that_the_base_lacks(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "bert-classifier", r=2, target_modules=["query"], task_type="SEQ_CLS")
    message, hint = refusal(folder, target_modules(build("bert-mlm")))
    assert message == (
        "tensors without a use in base 'tiny': 'base_model.model.classifier.bias', "
        f"'base_model.model.classifier.weight' (it has no module 'classifier'; {NO_NAME})"
    )
    assert hint == RIGHT_BASE


def test_a_saved_module_without_its_tensor(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "bert-classifier", r=2, target_modules=["query"], task_type="SEQ_CLS")
    edit_tensors(folder, lambda tensors: {key: value for key, value in tensors.items() if "classifier.b" not in key})
    assert refusal(folder, target_modules(build("bert-classifier"))) == (
        "modules_to_save saves module 'classifier' of base 'tiny', and tensor 'classifier.bias' is missing",
        f"{DAMAGED}, or {RIGHT_BASE}",
    )


def test_a_missing_trained_bias(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "bert-classifier", r=2, target_modules=["query"], bias="all")
    key = "base_model.model.bert.pooler.dense.bias"
    edit_tensors(folder, lambda tensors: {name: value for name, value in tensors.items() if name != key})
    assert refusal(folder, target_modules(build("bert-classifier"))) == (
        "bias is 'all', but trained biases are missing, those of 'bert.pooler.dense'",
        f"{DAMAGED}, or {RIGHT_BASE}",
    )


def test_a_bias_that_nobody_trained(folder: Path, modules: dict[str, TargetModule]) -> None:
    key = f"base_model.model.{Q0}.base_layer.bias"
    edit_tensors(folder, lambda tensors: {**tensors, key: torch.ones(16)})
    assert refusal(folder, modules)[0].startswith(f"tensors without a use in base 'tiny': {key!r}")
    with_bias = target_modules(build("llama-bias"))
    assert refusal(folder, with_bias)[0] == (
        f"tensor {key!r} is not the bias of base 'tiny', although bias is 'none'; {NO_NAME}"
    )


def test_rank_of_tensor_and_config(folder: Path, modules: dict[str, TargetModule]) -> None:
    edit_config(folder, r=4)
    assert refusal(folder, modules) == (
        f"tensor 'base_model.model.{Q0}.lora_A.weight' has rank 2, but the config says 4 for module {Q0!r}",
        "copy the adapter_config.json that was saved with these tensors",
    )


def test_ranks_as_whole_floats(folder: Path, modules: dict[str, TargetModule]) -> None:
    edit_config(folder, r=4, rank_pattern={Q0: 2.0, Q1: 2.0}, alpha_pattern={Q0: 2.5}, lora_alpha=8)
    plain = resolve(read_adapters(folder)[0], modules)
    site, other = plain.sites[Q0], plain.sites[Q1]
    tensors = read_adapters(folder)[0].tensors
    np.testing.assert_allclose(site.b, tensors[f"{Q0}.lora_B.weight"].read().T * 1.25, rtol=1e-6)
    np.testing.assert_allclose(other.b, tensors[f"{Q1}.lora_B.weight"].read().T * 4, rtol=1e-6)


def test_the_first_pattern_that_matches_counts(folder: Path, modules: dict[str, TargetModule]) -> None:
    edit_config(folder, alpha_pattern={"q_proj": 6, Q0: 100})
    (adapter,) = read_adapters(folder)
    site = resolve(adapter, modules).sites[Q0]
    np.testing.assert_allclose(site.b, adapter.tensors[f"{Q0}.lora_B.weight"].read().T * 3, rtol=1e-6)


# The right base


def test_a_base_of_another_width(folder: Path, modules: dict[str, TargetModule]) -> None:
    edit_config(folder, base_model_name_or_path="org/base", revision="abc")
    wide = {path: replace(module, weight_shape=(32, 32)) for path, module in modules.items()}
    assert refusal(folder, wide) == (
        (
            f"tensor 'base_model.model.{Q0}.lora_A.weight' in {folder / 'adapter_model.safetensors'} has shape "
            f"[2, 16], but module {Q0!r} of base 'tiny' (a Linear with weight [32, 32]) "
            "needs [2, 32]; the adapter was trained on base 'org/base' at revision abc, "
            "this is base 'tiny'"
        ),
        RIGHT_BASE,
    )


def test_a_base_of_another_architecture(folder: Path) -> None:
    message, hint = refusal(folder, target_modules(build("gpt2")))
    assert message.startswith(f"the adapter changes module {Q0!r}, which the base does not have (its nearest is '")
    assert hint == RIGHT_BASE


def test_an_unsupported_layer(folder: Path, modules: dict[str, TargetModule]) -> None:
    modules[Q0] = replace(modules[Q0], type="other", class_name="Conv3d")
    assert refusal(folder, modules) == (
        f"module {Q0!r} is a Conv3d; LoRA is known for linear, conv1d, conv2d, embedding modules",
        "exclude the module and train again",
    )


def stamp(folder: Path, digests: dict[str, str], quantization: str | None = None) -> None:
    stamped = {"schema": "edgeadapt.base/1", "name": "org/base", "revision": "abc", "quantization": quantization}
    (folder / "base_fingerprint.json").write_text(json.dumps({**stamped, "parameters": digests}))


def test_the_stamped_base(folder: Path, modules: dict[str, TargetModule]) -> None:
    stamp(folder, {f"{path}.weight": module.digest for path, module in modules.items()})
    (adapter,) = read_adapters(folder)
    assert adapter.warnings == ()
    assert (adapter.base.name, adapter.base.revision) == ("org/base", "abc")
    assert set(resolve(adapter, modules).sites) == {Q0, Q1}


def test_another_than_the_stamped_base(folder: Path, modules: dict[str, TargetModule]) -> None:
    stamp(folder, {f"{Q1}.weight": "0" * 64})
    assert refusal(folder, modules) == (
        (
            f"the base is not the one that the adapter was trained on: tensor '{Q1}.weight' has digest "
            f"{modules[Q1].digest[:12]} in base 'tiny' and 000000000000 in base 'org/base' at revision abc"
        ),
        "give the base (and revision) that the adapter was trained on",
    )


def test_the_stamp_of_a_base_in_nf4(folder: Path, modules: dict[str, TargetModule]) -> None:
    """Linear weights were rounded, so their digests are others in full precision; what was not rounded must agree."""
    linear = {f"{path}.weight": "0" * 64 for path, module in modules.items() if module.type == "linear"}
    others = {f"{path}.weight": module.digest for path, module in modules.items() if module.type != "linear"}
    stamp(folder, {**linear, **others}, "nf4")
    assert set(resolve(read_adapters(folder)[0], modules).sites) == {Q0, Q1}
    embedding = "model.embed_tokens"
    stamp(folder, {**linear, **others, f"{embedding}.weight": "0" * 64}, "nf4")
    assert refusal(folder, modules) == (
        (
            f"the base is not the one that the adapter was trained on: tensor '{embedding}.weight' has digest "
            f"{modules[embedding].digest[:12]} in base 'tiny' and 000000000000 in base 'org/base' at revision abc, "
            "quantized to nf4"
        ),
        "give the base (and revision) that the adapter was trained on",
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "must hold exactly name, parameters, quantization, revision, schema"),
        (
            '{"schema": "x", "name": null, "revision": null, "quantization": null, "parameters": {}}',
            "has schema 'x', not 'edgeadapt.base/1'",
        ),
    ],
)
def test_damaged_stamp(folder: Path, text: str, reason: str) -> None:
    (folder / "base_fingerprint.json").write_text(text)
    with pytest.raises(AdapterError) as caught:
        read_adapters(folder)
    assert caught.value.message == f"{folder / 'base_fingerprint.json'} {reason}"


def test_a_digest_that_is_none(folder: Path) -> None:
    stamp(folder, {"a.weight": "12"})
    with pytest.raises(AdapterError) as caught:
        read_adapters(folder)
    assert caught.value.message == (
        f"{folder / 'base_fingerprint.json'}: parameters['a.weight'] is '12', not a SHA-256"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_embedding_in_the_file_proves_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save(tmp_path / "a", "llama", r=2, target_modules=["embed_tokens"])
    edit_tensors(folder, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    modules = target_modules(build("llama"))
    assert set(resolve(read_adapters(folder)[0], modules).sites) == {"model.embed_tokens"}

    other = modules["model.embed_tokens"].weight().copy()
    other[0, 0] += 1
    changed = replace(modules["model.embed_tokens"], weight=lambda: other, digest="0" * 64)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert refusal(folder, {**modules, "model.embed_tokens": changed})[0] == (
        f"tensor {key!r}, the base's own weight as the adapter saw it (shape [30, 16]), is not "
        f"'model.embed_tokens.weight' of base 'tiny' (shape [30, 16]); {NO_NAME}"
    )


def test_added_tokens(tmp_path: Path) -> None:
    model = build("llama")
    model.resize_token_embeddings(33)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    message, hint = refusal(tmp_path / "a", target_modules(build("llama")))
    assert message == (
        f"tensor 'base_model.model.lm_head.weight' in {tmp_path / 'a' / 'adapter_model.safetensors'} has shape "
        "[33, 16], but 'lm_head.weight' of base 'tiny' has [30, 16] "
        f"(it was trained with 3 tokens more); {NO_NAME}"
    )
    assert hint == "resize the base's embeddings as in training and save it as a base"


def test_embeddings_that_were_saved_unchanged(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(build("llama"), config).save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    resolved = resolve(read_adapters(tmp_path / "a")[0], target_modules(build("llama")))
    assert dict(resolved.replaced) == {}


# Without the base's values, as in a bundle


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"use_dora": True},
            (
                "DoRA at module 'bert.encoder.layer.0.attention.self.query' needs the base's weights, which a bundle "
                "does not hold"
            ),
        ),
        (
            {"bias": "lora_only"},
            (
                "the bias of module 'bert.encoder.layer.0.attention.self.query' changes, and the base's own bias is "
                "not at hand in a bundle"
            ),
        ),
    ],
)
def test_what_needs_the_base(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    folder = save(tmp_path / "a", "bert-classifier", r=2, target_modules=["query"], **settings)
    modules = target_modules(build("bert-classifier"), values=False)
    assert refusal(folder, modules) == (message, "pass --base")


def test_what_does_not_need_the_base(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "gpt2", r=2, target_modules=["c_attn", "wte"], lora_bias=False, use_rslora=True)
    model = build("gpt2")
    (adapter,) = read_adapters(folder)
    full = resolved_values(resolve(adapter, target_modules(model)))
    bare = resolved_values(resolve(adapter, target_modules(model, values=False)))
    assert full.keys() == bare.keys()
    assert all(np.array_equal(full[key], bare[key]) for key in full)


def test_a_scaled_embedding_of_unknown_scale(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "tagger", r=2, target_modules=["embed"])
    modules = target_modules(build("tagger"))
    modules["embed"] = replace(modules["embed"], output_scale=None)
    assert refusal(folder, modules) == (
        "embedding 'embed' is a ScaledEmbedding, and its scale is not known",
        "pass --base",
    )


# Names that moved


def test_an_adapter_of_the_bare_model_on_a_model_with_a_head(tmp_path: Path) -> None:
    """Trained on AutoModel ("encoder.layer.0"), used with a head on top ("bert.encoder.layer.0")."""
    folder = save(tmp_path / "a", "bert", r=2, use_dora=True, target_modules=["query", "dense"])
    model, inputs = build("bert-mlm"), inputs_of("bert-mlm")
    model.bert.load_state_dict(build("bert").state_dict(), strict=False)
    edit_tensors(folder, lambda tensors: {key: value for key, value in tensors.items() if ".pooler." not in key})
    edit_config(folder, exclude_modules=["pooler.dense"])
    resolved = resolve(read_adapters(folder)[0], target_modules(model))
    assert all(path.startswith("bert.encoder.layer.") for path in resolved.sites)
    reference = PeftModel.from_pretrained(model.bert, str(folder)).eval()
    hidden = outputs(attach(_untouched(model), resolved).bert, inputs)
    assert relative_error(hidden, outputs(reference, inputs)) < 1e-5


def _untouched(model: torch.nn.Module) -> torch.nn.Module:
    """Return a fresh copy: peft changes the model that it is given."""
    fresh = build("bert-mlm")
    fresh.bert.load_state_dict(build("bert").state_dict(), strict=False)
    return fresh


def test_an_adapter_of_a_model_with_a_head_on_the_bare_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "bert-classifier", r=2, target_modules=["query"])
    resolved = resolve(read_adapters(folder)[0], target_modules(build("bert")))
    assert set(resolved.sites) == {f"encoder.layer.{layer}.attention.self.query" for layer in (0, 1)}


def test_moves() -> None:
    text = ["text.encoder.layer.0.q", "text.encoder.layer.1.q"]
    assert find_move(["encoder.layer.0.q"], text) == Move("", "text.")
    assert find_move(["x.text.encoder.layer.1.q"], text) == Move("x.", "")
    assert find_move(["m.lm.layers.0.q"], ["lm.m.layers.0.q"]) == Move("m.lm.", "lm.m.")
    assert find_move(text[:1], text) == Move()


@pytest.mark.parametrize("path", ["encoder.layer.2.q", "decoder.layer.0.q", "layer.0.layer.0.q"])
def test_moves_that_nothing_proves(path: str) -> None:
    """Another layer's number or another tower's name is another module, however alike the rest is."""
    with pytest.raises(AdapterError) as caught:
        find_move([path], ["encoder.layer.0.q"])
    assert caught.value.message == (
        f"the adapter changes module {path!r}, which the base does not have (its nearest is 'encoder.layer.0.q'); 0 of "
        "the adapter's 1 modules are there"
    )


def test_moves_that_are_ambiguous() -> None:
    with pytest.raises(AdapterError) as caught:
        find_move(["layers.0.q"], ["text.layers.0.q", "image.layers.0.q"])
    assert caught.value.message == (
        "the adapter's module 'layers.0.q' can be 'image.layers.0.q' or 'text.layers.0.q' in the base"
    )
    assert caught.value.hint == RIGHT_BASE


# Other ways to the same file


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_converted_adapters_are_plain(tmp_path: Path, method: str) -> None:
    """peft writes the difference to the initial factors, at twice the rank, with init_lora_weights true."""
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=method, target_modules=["q_proj", "up_proj"])
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = method
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    reference = outputs(model, inputs_of("llama"))
    converted = tmp_path / "converted"
    model.save_pretrained(str(converted), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    plain = build("llama")
    resolved = resolve(read_adapters(converted)[0], target_modules(plain))
    assert {site.rank for site in resolved.sites.values()} == {4}
    # the base of the reference went through W - s B A, in float32
    assert relative_error(outputs(attach(plain, resolved), inputs_of("llama")), reference) < 5e-5


def test_all_linear_as_a_word(tmp_path: Path) -> None:
    """`model.add_adapter` of transformers may save the word itself; the output layer is left out, as by peft."""
    folder = save(tmp_path / "a", "llama", r=2, target_modules="all-linear")
    modules = target_modules(build("llama"))
    expected = set(resolve(read_adapters(folder)[0], modules).sites)
    edit_config(folder, target_modules="all-linear")
    assert set(resolve(read_adapters(folder)[0], modules).sites) == expected
    edit_tensors(folder, lambda tensors: {key: value for key, value in tensors.items() if "layers.1.mlp.up" not in key})
    assert refusal(folder, modules)[0].startswith("no tensors for 1 of the 14 modules that target_modules selects: ")


def test_a_head_with_other_labels(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "bert-classifier", r=2, target_modules=["query"], task_type="SEQ_CLS")
    modules = target_modules(build("bert-classifier"))
    head = replace(modules["classifier"], weight_shape=(7, 16), out_features=7)
    resolved = resolve(read_adapters(folder)[0], {**modules, "classifier": head})
    assert {key: value.shape for key, value in resolved.replaced.items()} == {
        "classifier.weight": (3, 16),
        "classifier.bias": (3,),
    }


def test_a_head_of_another_width(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "bert-classifier", r=2, target_modules=["query"], task_type="SEQ_CLS")
    modules = target_modules(build("bert-classifier"))
    head = replace(modules["classifier"], weight_shape=(3, 32), in_features=32)
    assert refusal(folder, {**modules, "classifier": head}) == (
        (
            f"tensor 'base_model.model.classifier.weight' in {folder / 'adapter_model.safetensors'} has shape [3, 16], "
            f"but 'classifier.weight' of base 'tiny' has [3, 32]; {NO_NAME}"
        ),
        RIGHT_BASE,
    )


# What is said of an adapter


def test_description(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "a",
        "bert-classifier",
        r=2,
        lora_alpha=6,
        target_modules=["query", "value"],
        rank_pattern={"value": 3},
        task_type="SEQ_CLS",
    )
    (adapter,) = read_adapters(folder)
    description = describe(adapter)
    assert json.loads(json.dumps(description)) == description
    assert description == {
        "name": "a",
        "kind": "lora",
        "layout": "peft",
        "task": "text-classification",
        "labels": 3,
        "base": {"name": None, "revision": None, "quantization": None, "fingerprint": False},
        "parameters": 2 * (2 + 3) * 32 + 3 * 16 + 3,
        "tensors": 10,
        "dtypes": ["F32"],
        "file_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "variant": {
            "rslora": False,
            "dora": False,
            "lora_bias": False,
            "rank_pattern": True,
            "alpha_pattern": False,
        },
        "rank": {"min": 2, "max": 3, "modules": {"2": 2, "3": 2}},
        "alpha": 6,
        "alpha_pattern": {},
        "scaling": "alpha / rank",
        "target_modules": {"count": 4, "names": ["query", "value"]},
        "modules_to_save": ["classifier", "score"],
        "trained_biases": "none",
        "merge": {
            "exact": True,
            "reason": "the change is linear in the module's input and folds into its weight",
        },
        "swap": {"possible": True, "reason": "a low-rank term beside each module"},
        "needs_base_weights": False,
        "warnings": list(adapter.warnings),
    }


def test_a_grouped_convolution_cannot_be_merged(tmp_path: Path) -> None:
    (adapter,) = read_adapters(save(tmp_path / "a", "conv", r=4, target_modules=["grouped"]))
    assert describe(adapter)["merge"] == {
        "exact": False,
        "reason": "module 'grouped' is a grouped convolution, and LoRA mixes its groups",
    }


@pytest.mark.parametrize(
    ("base", "task_type", "task", "labels"),
    [
        ("bert-classifier", "SEQ_CLS", "text-classification", 3),
        ("llama", "CAUSAL_LM", "text-generation", None),
        ("llama", None, None, None),
    ],
)
def test_task_and_labels(
    tmp_path: Path, base: str, task_type: str | None, task: str | None, labels: int | None
) -> None:
    targets = ["query"] if base == "bert-classifier" else ["q_proj"]
    folder = save(tmp_path / "a", base, r=2, target_modules=targets, task_type=task_type)
    (adapter,) = read_adapters(folder)
    assert (task_of(adapter), default_head_size(adapter)) == (task, labels)
