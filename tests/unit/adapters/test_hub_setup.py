"""Compositions of AdapterHub's adapters: what is read from their folders, and what is refused with which words."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
import transformers
from adapters.composition import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from safetensors.torch import load_file, save_file

from edgeadapt.adapters import describe, read_adapters
from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.adapters.resolve import resolve
from edgeadapt.errors import AdapterError
from edgeadapt.merging.modules import target_modules

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS: Mapping[str, Any] = {
    "a": adapters.SeqBnConfig(reduction_factor=4),
    "b": adapters.SeqBnConfig(reduction_factor=8),
    "inv": adapters.SeqBnInvConfig(reduction_factor=4),
    "par": adapters.ParBnConfig(reduction_factor=4),
    "silu": adapters.SeqBnConfig(reduction_factor=4, non_linearity="swish"),
    "first": adapters.SeqBnConfig(reduction_factor=4, leave_out=[1]),
    "lora": adapters.LoRAConfig(r=2),
    "prefix": adapters.PrefixTuningConfig(prefix_length=2, flat=True),
}


@cache
def base() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


@cache
def modules() -> Mapping[str, TargetModule]:
    return target_modules(base())


def save(folder: Path, setup: Any, **fusion: Any) -> Path:
    logging.getLogger("adapters").setLevel(logging.CRITICAL)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    model.load_state_dict(base().state_dict())
    adapters.init(model)
    for name in sorted(setup.flatten()):
        model.add_adapter(name, config=CONFIGS[name])
    for block in (setup, *setup.children):
        if isinstance(block, Fuse):
            model.add_adapter_fusion(block, adapters.DynamicAdapterFusionConfig(**fusion))
    safe = "prefix" not in setup.flatten()  # safetensors refuses what shares memory
    model.save_adapter_setup(str(folder), setup, use_safetensors=safe)
    return folder


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    """Return the words with which an adapter is refused, when read or when put on the base."""
    with pytest.raises(AdapterError) as caught:
        resolve(read_adapters(folder)[0], modules(), base_name="bert")
    return caught.value.message.replace(f"{folder}", "FOLDER")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("setup") / "mine", Stack("inv", Fuse("a", "b")))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "mine"))


def test_a_composition_is_one_adapter(folder: Path) -> None:
    (adapter,) = read_adapters(folder)
    assert (adapter.name, adapter.kind) == ("mine", "adapterhub_setup")
    assert {key.rpartition("@")[2] for key in adapter.tensors if "@" in key} == {"inv", "a", "b", "a,b"}
    assert {"classifier.weight", "classifier.bias"} < adapter.tensors.keys()
    described = describe(adapter)
    assert (described["composition"], described["task"]) == ("Stack[inv, Fuse[a, b]]", "text-classification")
    assert described["parts"] == [{"name": name, "kind": "bottleneck"} for name in ("inv", "a", "b")]
    found = resolve(adapter, modules()).bottlenecks
    last = [(item.stage, item.up.shape) for item in found if "layer.1" in item.site]
    assert last == [(0, (4, 16)), (1, (2, 4, 16))]
    assert found[-1].site == "bert.embeddings.LayerNorm"


def test_the_folders_of_a_trainer(folder: Path, tmp_path: Path) -> None:
    """Adapters and a fusion side by side, without a file that says how they are put together."""
    root = tmp_path / "checkpoint"
    for name in ("a", "b", "a,b"):
        shutil.copytree(folder / name, root / name)
    found = read_adapters(root)
    assert [(adapter.name, adapter.kind) for adapter in found] == [
        ("a", "bottleneck"),
        ("a-b", "adapterhub_setup"),
        ("b", "bottleneck"),
    ]
    assert describe(found[1])["composition"] == "Fuse[a, b]"
    shutil.rmtree(root / "b")
    assert str(root / "a,b" / "b" / "adapter_config.json") in refusal(root / "a,b").replace("FOLDER", str(root / "a,b"))


def test_only_the_first_adapter_s_invertible_part_is_used(tmp_path: Path) -> None:
    (adapter,) = read_adapters(save(tmp_path / "x", Stack("a", "inv")))
    assert adapter.warnings[-1] == (
        "the invertible part of 'inv' is not used: the library uses that of the first adapter alone"
    )
    assert not any("embeddings" in item.site for item in resolve(adapter, modules()).bottlenecks)


COMPOSITIONS: Mapping[str, tuple[Any, str]] = {
    "parallel": (
        Parallel("a", "b"),
        (
            "FOLDER/adapter_setup.json: the composition Parallel[a, b] gives a row of outputs for each adapter and row "
            "of inputs: several answers, not one adapter"
        ),
    ),
    "rows": (
        BatchSplit("a", "b", batch_sizes=[1, 2]),
        (
            "FOLDER/adapter_setup.json: the composition BatchSplit[a, b] gives fixed numbers of a batch's rows to "
            "different adapters: it is no one adapter"
        ),
    ),
    "tokens": (
        Split("a", "b", splits=[3, 4]),
        (
            "FOLDER/adapter_setup.json: the composition Split[a, b] gives fixed ranges of a text's tokens to different "
            "adapters, and runs for texts of just that length alone"
        ),
    ),
    "tasks": (
        MultiTask("a", "b"),
        (
            "FOLDER/adapter_setup.json: the composition MultiTask[a, b] chooses the adapter by the task of each row: "
            "it is no one adapter"
        ),
    ),
    "inside": (
        Stack("inv", Parallel("a", "b")),
        (
            "FOLDER/adapter_setup.json: the composition Parallel[a, b] gives a row of outputs for each adapter and row "
            "of inputs: several answers, not one adapter"
        ),
    ),
    "average": (
        Average("a", "b"),
        (
            "adapter 'x': the composition Average[a, b] averages bottlenecks, and the library divides their weighted "
            "sum by their number once more: the base's own output would shrink with it"
        ),
    ),
    "parallel in a stack": (
        Stack("a", "par"),
        (
            "adapter 'x': the composition Stack[a, par] has several adapters at bert.encoder.layer.0.output, and 'par' "
            "is parallel: the library then loses the layer's output, or adds its input twice"
        ),
    ),
    "activations": (
        Fuse("a", "silu"),
        (
            "adapter 'x': the fusion 'a,silu' is of adapters that differ in activation or in what they read at "
            "bert.encoder.layer.0.output ('a': relu, norm; 'silu': silu, norm)"
        ),
    ),
    "layers": (
        Fuse("a", "first"),
        (
            "adapter 'x': adapter 'first' has nothing at bert.encoder.layer.1.output, where 'a' has a bottleneck: the "
            "library cannot run it"
        ),
    ),
    "prefix": (
        Stack("a", "prefix"),
        "the composition Stack[a, prefix] holds 'prefix' of kind adapterhub_prefix, which is not composed yet",
    ),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_that_are_not_one_adapter(name: str, tmp_path: Path) -> None:
    setup, message = COMPOSITIONS[name]
    assert refusal(save(tmp_path / "x", setup)) == message


def test_a_fusion_of_what_is_no_bottleneck(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path / "x", Stack("lora")) / "lora", folder / "lora")
    shutil.move(folder / "a,b", folder / "a,lora")
    file = folder / "a,lora" / "model_adapter_fusion.safetensors"
    save_file({key.replace("a,b", "a,lora"): tensor for key, tensor in load_file(file).items()}, file)
    singles = [{"type": "single", "children": [name]} for name in ("a", "lora")]
    edit(
        folder / "adapter_setup.json",
        lambda content: content.update(adapter_setup={"type": "Fuse", "children": singles}, head_setup=None),
    )
    assert refusal(folder) == (
        "the composition Fuse[a, lora] fuses 'lora' of kind adapterhub_lora: AdapterFusion is of bottlenecks"
    )


FUSIONS: Mapping[str, tuple[dict[str, Any], str]] = {
    "temperature": (
        {"temperature": True},
        "temperature is true: the library lowers it at each call, so no two calls give the same",
    ),
    "residual": (
        {"residual_before": True},
        "residual_before is true: the base's own output would go through the fusion's value too",
    ),
    "nothing": (
        {"key": False, "query": False, "value": False},
        "key, query and value are all false: it would have nothing trained that the library uses",
    ),
    "query": (
        {"query_before_ln": True},
        "query_before_ln is true, and its adapters read what is behind the layer's norm",
    ),
    "unknown": ({"magic": 1}, "magic is 1, a setting that edgeadapt does not know"),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_fusions_that_mean_something_else(name: str, folder: Path) -> None:
    settings, message = FUSIONS[name]
    edit(folder / "a,b" / "adapter_fusion_config.json", lambda content: content["config"].update(settings))
    assert refusal(folder).removeprefix("adapter 'mine': ") == f"fusion 'a,b': {message}"


def test_a_fusion_s_tensors_are_complete_and_fit(folder: Path) -> None:
    file = folder / "a,b" / "model_adapter_fusion.safetensors"
    whole = load_file(file)
    key = "bert.encoder.layer.0.output.adapter_fusion_layer.a,b.key.bias"
    save_file({name: tensor for name, tensor in whole.items() if name != key}, file)
    assert refusal(folder) == "tensor 'bert.encoder.layer.0.output.key.bias' of the fusion is missing"
    save_file({**whole, key: torch.zeros(5)}, file)
    assert refusal(folder) == (
        f"adapter 'mine': tensor {key!r} in FOLDER/a,b/model_adapter_fusion.safetensors has the shape [5], this base "
        "needs [16]"
    )
    save_file({**whole, "x.adapter_fusion_layer.c.key.bias": torch.zeros(16)}, file)
    assert refusal(folder) == (
        "tensor 'x.adapter_fusion_layer.c.key.bias' in FOLDER/a,b/model_adapter_fusion.safetensors is not one of "
        "fusion 'a,b'"
    )
    layer = "bert.encoder.layer.1.output.adapter_fusion_layer"
    save_file({name: tensor for name, tensor in whole.items() if not name.startswith(layer)}, file)
    assert refusal(folder) == (
        "adapter 'mine': fusion 'a,b' has nothing at bert.encoder.layer.1.output, where 'a' has a bottleneck: the "
        "library cannot run it"
    )


DAMAGES: Mapping[str, tuple[Any, str]] = {
    "elsewhere": (
        {"type": "Stack", "children": [{"type": "single", "children": ["../secret"]}]},
        "FOLDER/adapter_setup.json: ['../secret'] is not an adapter's name",
    ),
    "empty": ({"type": "Stack", "children": []}, "is no composition of adapters"),
    "text": ("Stack", "FOLDER/adapter_setup.json: 'Stack' is no composition of adapters"),
    "unknown": (
        {"type": "Mix", "children": [{"type": "single", "children": ["a"]}]},
        "FOLDER/adapter_setup.json: the composition is of an unknown type 'Mix'",
    ),
    "nested": (
        {
            "type": "Fuse",
            "children": [{"type": "Stack", "children": [{"type": "single", "children": ["a"]}]}],
        },
        "FOLDER/adapter_setup.json: the composition Fuse[Stack[a]] fuses what is composed itself",
    ),
    "missing": (
        {"type": "Stack", "children": [{"type": "single", "children": ["gone"]}]},
        "FOLDER/gone/adapter_config.json",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_setups_are_refused(name: str, folder: Path) -> None:
    setup, message = DAMAGES[name]
    edit(folder / "adapter_setup.json", lambda content: content.update(adapter_setup=setup))
    found = refusal(folder)
    assert message in found


def test_which_head_is_said_or_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "a" / "model_head.safetensors"
    save_file({**load_file(file), "classifier.bias": torch.ones(2)}, file)
    assert read_adapters(folder)  # a stack runs with its last adapter's
    fusion = tmp_path / "fusion"
    for name in ("a", "b", "a,b"):
        shutil.copytree(folder / name, fusion / name)
    assert refusal(fusion / "a,b") == (
        "adapters 'a' and 'b' have heads of their own: which one the composition runs with is not said"
    )
    edit(folder / "adapter_setup.json", lambda content: content.update(head_setup=["a", "b"]))
    assert refusal(folder) == "head_setup is ['a', 'b'], more than one head"
    edit(folder / "adapter_setup.json", lambda content: content.update(head_setup=True))
    assert refusal(folder) == "FOLDER has no head_config.json"
    for name in ("head_config.json", "model_head.safetensors"):
        shutil.copy(folder / "a" / name, folder / name)
    (adapter,) = read_adapters(folder)
    assert adapter.tensors["classifier.bias"].read().tolist() == [1.0, 1.0]


def test_another_adapter_in_a_part_s_folder(folder: Path) -> None:
    edit(folder / "a" / "adapter_config.json", lambda content: content.update(name="z"))
    assert "is not one of adapter 'z'" in refusal(folder)
    shutil.rmtree(folder / "a")
    shutil.copytree(folder / "b", folder / "a")
    assert refusal(folder) == "FOLDER/a holds adapter 'b', the composition wants 'a'"
