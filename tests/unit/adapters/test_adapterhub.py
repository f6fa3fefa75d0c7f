"""What is read from AdapterHub's folders, and what is refused with which words; no file of them runs anything."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
import torch
import transformers

from edgeadapt.adapters import describe, read_adapters
from edgeadapt.adapters.resolve import resolve
from edgeadapt.adapters.torch_file import read_torch_tensors
from edgeadapt.errors import AdapterError
from edgeadapt.merging.modules import target_modules

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
UP = "bert.encoder.layer.0.output.adapters.adapter_up.weight"


def save(folder: Path, config: Any, *, safe: bool = True, name: str = "task") -> Path:
    torch.manual_seed(0)
    logging.getLogger("adapters").setLevel(logging.CRITICAL)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    adapters.init(model)
    model.add_adapter(name, config=config)
    model.save_adapter(str(folder), name, use_safetensors=safe)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {safe: save(root / f"{safe}", adapters.SeqBnConfig(reduction_factor=4), safe=safe) for safe in (True, False)}


@pytest.fixture
def folder(originals: dict[bool, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[True], tmp_path / "mine"))


@pytest.fixture
def pickled(originals: dict[bool, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[False], tmp_path / "pickled"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object], file: str = "adapter_config.json") -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapters(folder)
    return caught.value.message.replace(f"{folder}", "FOLDER")


def test_a_folder_is_read_without_the_adapter_s_name(folder: Path, pickled: Path) -> None:
    (adapter,) = read_adapters(folder)
    assert (adapter.name, adapter.kind, adapter.layout) == ("mine", "bottleneck", "adapterhub")
    assert UP in adapter.tensors
    assert "classifier.weight" in adapter.tensors
    described = describe(adapter)
    assert (described["task"], described["labels"]) == ("text-classification", 2)
    assert described["width"] == {"min": 4, "max": 4, "places": {"4": 2}}
    assert described["merge"]["exact"] is False
    (other,) = read_adapters(pickled)
    assert sorted(other.tensors) == sorted(adapter.tensors)
    saved = torch.load(pickled / "pytorch_adapter.bin", weights_only=True)
    for key, tensor in saved.items():
        np.testing.assert_array_equal(other.tensors[key.replace(".task.", ".")].read(), tensor.numpy())


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown": (lambda c: c["config"].update(magic=1), "magic is 1, a setting that edgeadapt does not know"),
    "glow": (
        lambda c: c["config"].update(inv_adapter="glow"),
        "the invertible adapter is of the block type 'glow', which the library itself cannot run",
    ),
    "older glow": (
        lambda c: c["config"].update(invertible_adapter={"block_type": "glow", "reduction_factor": 2}),
        "the invertible adapter is of the block type 'glow', which the library itself cannot run",
    ),
    "gates": (
        lambda c: c["config"].update(use_gating=True),
        "use_gating is True: gates that are averaged over the tokens (UniPELT), which the graphs do not have yet",
    ),
    "activation": (
        lambda c: c["config"].update(non_linearity="mish"),
        "non_linearity is 'mish', which is not supported",
    ),
    "residual": (
        lambda c: c["config"].update(original_ln_after=False),
        (
            "original_ln_before is True, original_ln_after False, residual_before_ln True and is_parallel False: "
            "together they lose the base's own residual, or add it twice"
        ),
    ),
    "scaling": (
        lambda c: c["config"].update(scaling="warm"),
        "scaling is 'warm', not a number, 'learned' or 'channel'",
    ),
    "nowhere": (
        lambda c: c["config"].update(output_adapter=False),
        "mh_adapter and output_adapter are both false: the adapter has no place",
    ),
    "factor": (
        lambda c: c["config"].update(reduction_factor=0),
        "reduction_factor is 0, not a number above 0, or a table of them",
    ),
    "gated prefix": (
        lambda c: c.update(config={"architecture": "prefix_tuning", "prefix_length": 3, "use_gating": True}),
        (
            "use_gating is true: keys and values would be scaled by an average over all tokens of the input, and a "
            "key-value cache is filled before they are known"
        ),
    ),
    "prefix in some layers": (
        lambda c: c.update(config={"architecture": "prefix_tuning", "prefix_length": 3, "leave_out": [1]}),
        (
            "leave_out is [1]: some layers have a prefix and some have none, and a key-value cache is equally long in "
            "all"
        ),
    ),
    "prefix setting": (
        lambda c: c.update(config={"architecture": "prefix_tuning", "prefix_length": 3, "magic": 1}),
        "magic is 1, a setting that edgeadapt does not know",
    ),
    "prefix length": (
        lambda c: c.update(config={"architecture": "prefix_tuning", "prefix_length": 0}),
        "prefix_length is 0, not a number of tokens",
    ),
    "gated lora": (
        lambda c: c.update(config={"architecture": "lora", "r": 4, "use_gating": True}),
        "use_gating is true: the gate is an average over all tokens of the input, so the change is no weight",
    ),
    "lora setting": (
        lambda c: c.update(config={"architecture": "lora", "r": 4, "magic": 1}),
        "magic is 1, a setting that edgeadapt does not know",
    ),
    "lora mode": (
        lambda c: c.update(config={"architecture": "lora", "r": 4, "composition_mode": "mix"}),
        "composition_mode is 'mix', not one of add, scale",
    ),
    "lora rank": (lambda c: c.update(config={"architecture": "lora", "r": 0}), "r is 0, not a rank"),
    "tasks": (
        lambda c: c.update(config={"architecture": "mtl_lora", "r": 4, "task_specific_matrix_type": "linear"}),
        "task_specific_matrix_type is 'linear', which the library itself cannot run",
    ),
    "prompt": (
        lambda c: c.update(config={"architecture": "prompt_tuning"}),
        (
            "architecture 'prompt_tuning' is not supported: its prompt lengthens the text of encoders, the only models "
            "that the library has it for"
        ),
    ),
    "empty union": (
        lambda c: c.update(config={"architecture": "union", "configs": []}),
        "configs is [], not a list of settings",
    ),
    "union of prefixes": (
        lambda c: c.update(config={"architecture": "union", "configs": [{"architecture": "prefix_tuning"}] * 2}),
        "it holds two prefixes",
    ),
    "union of refts": (
        lambda c: c.update(config={"architecture": "union", "configs": [{"architecture": "reft"}] * 2}),
        "it holds two ReFTs",
    ),
    "union with direft": (
        lambda c: c.update(
            config={"architecture": "union", "configs": [{"architecture": "reft", "subtract_projection": False}]}
        ),
        "configs[0]: subtract_projection is false, and in a union the library trains and computes DiReFT as NoReFT",
    ),
    "union with prompts": (
        lambda c: c.update(config={"architecture": "union", "configs": [{"architecture": "prompt_tuning"}]}),
        "configs[0]: architecture 'prompt_tuning' is not supported in a union",
    ),
    "unipelt": (
        lambda c: c.update(
            config={"architecture": "union", "configs": [{**c["config"], "architecture": None, "use_gating": True}]}
        ),
        (
            "configs[0]: use_gating is True: gates that are averaged over the tokens (UniPELT), which the graphs do "
            "not have yet"
        ),
    ),
    "method": (
        lambda c: c.update(config={"architecture": ["lora"]}),
        "architecture ['lora'] is not supported: no such method is known here",
    ),
    "text": (lambda c: c.update(config="pfeiffer"), "config is 'pfeiffer', not a table of settings"),
    "name": (lambda c: c.update(name="a.b"), "name is 'a.b', which no adapter can have"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_mean_something_else_are_refused(change: str, folder: Path) -> None:
    how, message = CHANGES[change]
    edit(folder, how)
    assert refusal(folder) == f"FOLDER/adapter_config.json: {message}"


def test_another_name_in_the_file_is_refused(folder: Path) -> None:
    edit(folder, lambda config: config.update(name="tas"))
    assert refusal(folder) == (
        "tensor 'bert.encoder.layer.0.output.adapters.task.adapter_down.0.bias' in FOLDER/adapter.safetensors is not "
        "one of adapter 'tas'"
    )


def test_a_tensor_too_many_or_too_few_is_refused(folder: Path) -> None:
    edit(folder, lambda config: config["config"].update(scaling="channel"))
    assert refusal(folder) == (
        "tensor 'bert.encoder.layer.0.output.adapters.scaling' is missing in FOLDER/adapter.safetensors"
    )
    edit(folder, lambda config: config["config"].update(scaling=1.0, phm_layer=True))
    assert refusal(folder) == (
        "tensor 'bert.encoder.layer.0.output.adapters.adapter_down.0.W_left' is missing in FOLDER/adapter.safetensors"
    )


def test_an_invertible_part_is_complete_or_refused(folder: Path) -> None:
    edit(folder, lambda config: config["config"].update(inv_adapter="nice"))
    assert refusal(folder) == "tensor 'invertible_adapters.F.0.bias' is missing in FOLDER/adapter.safetensors"
    save(folder, adapters.SeqBnInvConfig(reduction_factor=4))
    (adapter,) = read_adapters(folder)
    assert describe(adapter)["invertible"] == "nice"
    edit(folder, lambda config: config["config"].update(inv_adapter=None))
    assert refusal(folder) == (
        "tensor 'bert.invertible_adapters.task.F.0.bias' in FOLDER/adapter.safetensors does not fit its config"
    )


def test_the_parts_of_a_union_share_its_file(folder: Path) -> None:
    union = adapters.ConfigUnion(adapters.SeqBnConfig(reduction_factor=4), adapters.VeraConfig(r=2))
    save(folder, union)
    (adapter,) = read_adapters(folder)
    described = describe(adapter)
    assert [part["kind"] for part in described["parts"]] == ["bottleneck", "adapterhub_vera"]
    assert described["merge"] == {
        "exact": False,
        "reason": "a bottleneck is not linear in its input and folds into no weight",
    }
    edit(folder, lambda config: config["config"]["configs"].pop())
    assert refusal(folder) == (
        "tensor 'bert.encoder.layer.0.attention.self.query.loras.task.vera_B' in FOLDER/adapter.safetensors is of none "
        "of its parts"
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_heads_that_are_not_the_base_s_are_refused(family: str, tmp_path: Path) -> None:
    logging.getLogger("adapters").setLevel(logging.CRITICAL)
    if family == "bert":
        plain: Any = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
        model: Any = adapters.BertAdapterModel(plain.config)
        model.add_multiple_choice_head("x")
        message = (
            "a head of type 'multiple_choice' with 2 layers, 'tanh' between them and use_pooler False is not one that "
            "the given base has for its task"
        )
    else:
        plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
        model = adapters.LlamaAdapterModel(plain.config)
        model.add_causal_lm_head("x")
        message = (
            "a head of type 'causal_lm' with a norm between its layers is not one that the given base has for its task"
        )
    model.add_adapter("x", config=adapters.SeqBnConfig(reduction_factor=4))
    model.save_adapter(str(tmp_path / "x"), "x", use_safetensors=True)
    with pytest.raises(AdapterError) as caught:
        resolve(read_adapters(tmp_path / "x")[0], target_modules(plain))
    assert caught.value.message == f"adapter 'x': {message}"


def test_an_inverse_before_a_head_by_name_is_refused(tmp_path: Path) -> None:
    logging.getLogger("adapters").setLevel(logging.CRITICAL)
    model: Any = adapters.BertAdapterModel(transformers.BertConfig(**SMALL))
    model.add_masked_lm_head("x")
    model.add_adapter("x", config=adapters.SeqBnInvConfig(reduction_factor=4))
    model.save_adapter(str(tmp_path / "x"), "x", use_safetensors=True)
    assert refusal(tmp_path / "x") == (
        "FOLDER/adapter_config.json: it has an invertible part and a head of type 'masked_lm' by name, before which "
        "the library puts the inverse"
    )


def test_the_tensors_of_another_method_are_refused(folder: Path) -> None:
    key = "bert.encoder.layer.0.output.adapters.task.adapter_down.0.bias"
    for settings in ({"architecture": "lora", "r": 4}, {"architecture": "prefix_tuning", "prefix_length": 3}):
        edit(folder, lambda config, settings=settings: config.update(config=settings))  # type: ignore[misc]
        assert refusal(folder) == f"tensor {key!r} in FOLDER/adapter.safetensors does not fit its config"


PLUGINS: dict[str, tuple[Any, Any, str]] = {
    "phi": (
        transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL, num_key_value_heads=2)),
        adapters.ParBnConfig(reduction_factor=4),
        "a bottleneck at 'mlp.fc2' reads the residual, which the plugin interface does not name",
    ),
    "gemma": (
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8)),
        adapters.SeqBnConfig(reduction_factor=4),
        (
            "a bottleneck at 'mlp.down_proj' reads the residual, through 'post_feedforward_layernorm', of which the "
            "library takes the last layer's in all layers"
        ),
    ),
    "gemma in parallel": (
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8)),
        adapters.ParBnConfig(reduction_factor=4),
        (
            "a bottleneck at 'mlp.down_proj' reads the residual, which is another in this model than the plugin "
            "interface is known to mean"
        ),
    ),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_what_a_plugin_interface_does_not_say_is_refused(name: str, tmp_path: Path) -> None:
    model, config, message = PLUGINS[name]
    modules = target_modules(model)
    logging.getLogger("adapters").setLevel(logging.CRITICAL)
    adapters.init(model)
    model.add_adapter(name, config=config)
    model.save_adapter(str(tmp_path / "x"), name, use_safetensors=True)
    model.delete_adapter(name)
    (adapter,) = read_adapters(tmp_path / "x")
    with pytest.raises(AdapterError) as caught:
        resolve(adapter, modules)
    assert caught.value.message == f"adapter 'x': {message}"
    (tmp_path / "x" / "adapter_interface.json").write_text('{"interface": {"layer_self_attn": 1}}')
    assert refusal(tmp_path / "x") == "FOLDER/adapter_interface.json is no plugin interface"


def test_a_damaged_composition_is_refused(folder: Path) -> None:
    (folder / "adapter_setup.json").write_text("{}")
    assert refusal(folder) == "FOLDER/adapter_setup.json: None is no composition of adapters"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (__import__, ("this_would_run",))


def _archive(file: Path, table: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", table)
    return file


def _damaged(pickled: Path) -> Iterator[tuple[str, str]]:
    file = pickled / "pytorch_adapter.bin"
    whole = file.read_bytes()
    _archive(file, pickle.dumps({"a": Evil()}, protocol=2))
    yield "names __builtin__.__import__", refusal(pickled)
    _archive(file, pickle.dumps({"a": [1, 2]}, protocol=2))
    yield "holds the instruction EMPTY_LIST", refusal(pickled)
    _archive(file, pickle.dumps({"a": 1}, protocol=2))
    yield "holds a int at 'a'", refusal(pickled)
    _archive(file, pickle.dumps({"a": 1}, protocol=4))
    yield "is of protocol 4, torch.save writes 2", refusal(pickled)
    _archive(file, pickle.dumps({"a": 1}, protocol=2)[:-3])
    yield "has a damaged table of tensors", refusal(pickled)
    file.write_bytes(whole[: len(whole) // 2])
    yield "is truncated, damaged, or was saved by a torch older than 1.6", refusal(pickled)
    file.write_bytes(pickle.dumps({"a": Evil()}))
    yield "is truncated, damaged, or was saved by a torch older than 1.6", refusal(pickled)


def test_a_pickle_runs_nothing(pickled: Path) -> None:
    for expected, found in _damaged(pickled):
        assert expected in found


def test_a_view_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    torch.save({"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}, file)
    tensors = read_torch_tensors(file)
    np.testing.assert_array_equal(tensors["a"].read(), np.arange(6.0).reshape(2, 3).T)
    np.testing.assert_array_equal(tensors["b"].read(), np.ones(2))
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data[:-4] if name.endswith("data/0") else data)
    with pytest.raises(AdapterError) as caught:
        read_torch_tensors(file)
    assert caught.value.message == f"tensor 'a' in {file} needs 24 bytes, the file has 20"


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    torch.save({"a": torch.tensor([[1.0, float("nan")]])}, file)
    with pytest.raises(AdapterError) as caught:
        read_torch_tensors(file)["a"].read()
    assert caught.value.message == (
        f"tensor 'a' in {file} holds values that are not finite: 1 of 2, the first at [0, 1]"
    )
