"""What is read from an adapter's folder, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from edgeadapt.adapters import read_adapters, resolve
from edgeadapt.errors import AdapterError

from .tiny import build, edit_config, edit_tensors, resolved_values, save, target_modules, train

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "support", "llama", r=2, target_modules=["q_proj"])


def refusal(folder: Path) -> tuple[str, str]:
    with pytest.raises(AdapterError) as caught:
        read_adapters(folder)
    return caught.value.message, caught.value.hint


def test_keys_name_modules_and_parts(folder: Path) -> None:
    (adapter,) = read_adapters(folder)
    assert (adapter.name, adapter.kind, adapter.layout) == ("support", "lora", "peft")
    assert sorted(adapter.tensors) == [
        f"model.layers.{layer}.self_attn.q_proj.lora_{term}.weight" for layer in (0, 1) for term in "AB"
    ]
    tensor = adapter.tensors[f"{Q0}.lora_A.weight"]
    saved = load_file(folder / "adapter_model.safetensors")[f"base_model.model.{Q0}.lora_A.weight"]
    assert (tensor.shape, tensor.dtype) == ((2, 16), "F32")
    np.testing.assert_array_equal(tensor.read(), saved.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_read_as_float32(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    (adapter,) = read_adapters(folder)
    saved = load_file(folder / "adapter_model.safetensors")
    for key, tensor in adapter.tensors.items():
        read = tensor.read()
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, saved[f"base_model.model.{key}"].float().numpy())


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: "module." + key,
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".self_attn.weight"),
    ],
)
def test_keys_that_peft_loads_as_nothing_are_normalized(folder: Path, rename: Callable[[str], str]) -> None:
    modules = target_modules(build("llama"))
    expected = resolved_values(resolve(read_adapters(folder)[0], modules))
    edit_tensors(folder, lambda tensors: {rename(key): value for key, value in tensors.items()})
    measured = resolved_values(resolve(read_adapters(folder)[0], modules))
    assert measured.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(measured[key], value)


def test_several_adapters_in_one_folder(tmp_path: Path) -> None:
    model = train(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("sales", LoraConfig(r=3, target_modules=["v_proj"]))
    model.save_pretrained(str(tmp_path / "both"))
    adapters = read_adapters(tmp_path / "both")
    assert [adapter.name for adapter in adapters] == ["both", "sales"]
    assert [adapter.config["r"] for adapter in adapters] == [2, 3]

    model.save_pretrained(str(tmp_path / "one below"), selected_adapters=["sales"])
    assert [adapter.name for adapter in read_adapters(tmp_path / "one below")] == ["sales"]


def test_a_trainers_checkpoints_are_no_adapters(folder: Path) -> None:
    shutil.copytree(folder, folder / "checkpoint-10")
    (adapter,) = read_adapters(folder)
    assert "not read: the trainer's checkpoints checkpoint-10" in adapter.warnings
    (folder / "adapter_config.json").unlink()
    assert refusal(folder) == (
        f"{folder} holds only a trainer's checkpoints: checkpoint-10",
        "give the folder of one checkpoint",
    )


def test_warnings_say_what_cannot_be_checked(folder: Path) -> None:
    edit_config(folder, base_model_name_or_path="org/base")
    assert read_adapters(folder)[0].warnings == (
        "no base_fingerprint.json: only the base's module names and shapes can be checked",
        "revision is null: any revision of base 'org/base' loads alike",
    )


def test_a_pattern_without_a_module_is_a_warning(folder: Path) -> None:
    edit_config(folder, alpha_pattern={"no_such_proj": 3})
    warning = "alpha_pattern 'no_such_proj' matches no module that the adapter changes (peft ignores it too)"
    assert warning in read_adapters(folder)[0].warnings


# Folders and configs


def test_missing_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone") == (
        f"there is no adapter at {tmp_path / 'gone'}: no such folder",
        "check the path",
    )


def test_a_file_for_a_folder(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    expected = f"{file} is a file, not an adapter's folder"
    assert refusal(file) == (expected, "give the folder that holds adapter_config.json")


def test_an_empty_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no adapter: no adapter_config.json in it or its sub-folders",
        "check the path",
    )


def test_a_whole_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path) == (
        f"{tmp_path} is a whole model, not an adapter (it has config.json)",
        "give it as --base",
    )


def test_missing_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    assert refusal(folder) == (
        f"{folder} has no adapter_config.json",
        "copy it from where the adapter was trained: it holds alpha and the targets",
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "is not a JSON object"),
    ],
)
def test_damaged_config(folder: Path, text: str, reason: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    assert refusal(folder) == (f"{folder / 'adapter_config.json'} {reason}", "copy or download the adapter again")


def test_missing_tensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    assert refusal(folder) == (
        f"{folder} has adapter_config.json but no adapter_model.safetensors",
        "copy the file from where it was trained",
    )


def test_a_pickle_is_not_opened(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert refusal(folder) == (
        f"{folder / 'adapter_model.bin'} is a pickle, which can run any code when it is read",
        (
            "convert it where you trust it: load it with torch.load(..., weights_only=True) and save it with "
            "safetensors.torch.save_file as adapter_model.safetensors"
        ),
    )


def test_unknown_kind(folder: Path) -> None:
    edit_config(folder, peft_type="NO_SUCH")
    message, hint = refusal(folder)
    assert message == f"{folder / 'adapter_config.json'}: peft_type 'NO_SUCH' is not supported"
    assert hint.startswith("known kinds of adapter: ")
    assert "lora" in hint


def test_no_kind(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["peft_type"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert refusal(folder)[0] == f"{folder / 'adapter_config.json'} has no peft_type: it was not saved by peft"


_CONVERT = (
    "save it again with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it a "
    "plain LoRA of twice the rank"
)
_PLAIN = "train plain LoRA, or merge it with peft and use the merged model as a base"
CONFIGS = {
    "pissa": (
        {"init_lora_weights": "pissa_niter_4"},
        (
            "init_lora_weights is 'pissa_niter_4': PiSSA: it was trained on a base whose main singular parts were "
            "taken out"
        ),
        _CONVERT,
    ),
    "olora": (
        {"init_lora_weights": "olora"},
        "init_lora_weights is 'olora': OLoRA: it was trained on a base whose QR parts were taken out",
        _CONVERT,
    ),
    "corda": (
        {"init_lora_weights": "corda"},
        "init_lora_weights is 'corda': CorDA: it was trained on a base that was changed by data",
        _CONVERT,
    ),
    "lora_ga": (
        {"init_lora_weights": "lora_ga"},
        "init_lora_weights is 'lora_ga': LoRA-GA: it was trained on a base that was changed by gradients",
        _CONVERT,
    ),
    "loftq": (
        {"init_lora_weights": "loftq"},
        "init_lora_weights is 'loftq': LoftQ: it was trained on a quantized residual of the base that was not saved",
        _PLAIN,
    ),
    "unknown initialization": (
        {"init_lora_weights": "novel"},
        "init_lora_weights is 'novel': edgeadapt does not know if that changed the base",
        "update edgeadapt, or set it to true if the base was left as it was",
    ),
    "alora": (
        {"alora_invocation_tokens": [1, 2]},
        "alora_invocation_tokens is set: aLoRA: it acts only after its invocation tokens, which edgeadapt does not do",
        "train it without them",
    ),
    "arrow": (
        {"arrow_config": {"top_k": 3}},
        "arrow_config is set: Arrow: it routes each token among other adapters, which edgeadapt does not do",
        "export those adapters one by one",
    ),
    "kasa": (
        {"kasa_config": {"beta": 1e-4}},
        "kasa_config is set: KaSA: it was trained on a truncated base that was not saved, which edgeadapt does not do",
        _PLAIN,
    ),
    "layer replication": (
        {"layer_replication": [[0, 2], [1, 2]]},
        (
            "layer_replication is set: layer replication: it was trained on a taller model than the base, which "
            "edgeadapt does not do"
        ),
        _PLAIN,
    ),
    "qalora": (
        {"use_qalora": True},
        "use_qalora is set: QA-LoRA: it averages groups of inputs and needs its GPTQ base, which edgeadapt does not do",
        _PLAIN,
    ),
    "bdlora": (
        {"use_bdlora": {"nblocks": 2}},
        "use_bdlora is set: BD-LoRA: its factors are blocks of a block-diagonal matrix, which edgeadapt does not do",
        "expand them to plain LoRA",
    ),
    "target_parameters": (
        {"target_parameters": ["experts.down_proj"]},
        (
            "target_parameters is set: LoRA on bare parameters (mixture-of-experts weights), not on modules, which "
            "edgeadapt does not do"
        ),
        _PLAIN,
    ),
    "trainable tokens": (
        {"trainable_token_indices": [1]},
        (
            "trainable_token_indices is set: trainable tokens: it changes single rows of the embedding, which "
            "edgeadapt does not do"
        ),
        "train the embedding whole: modules_to_save=['embed_tokens']",
    ),
    "unknown key": (
        {"use_novel": 3, "peft_version": "9.0"},
        "unknown key 'use_novel' is set to 3 (saved by peft 9.0): it may change what is computed",
        "update edgeadapt, or remove the key if it has no effect after training",
    ),
    "rank": ({"r": "8"}, "r is '8', not a whole number above 0", "copy the file that peft wrote"),
    "alpha": ({"lora_alpha": 0}, "lora_alpha is 0, not a number above 0", "copy the file that peft wrote"),
    "bias": (
        {"bias": "some"},
        "bias is 'some', not 'none', 'all' or 'lora_only'",
        "copy the file that peft wrote",
    ),
    "no targets": (
        {"target_modules": []},
        "target_modules is empty: the adapter changes no module",
        "train it with targets",
    ),
    "null targets": (
        {"target_modules": None},
        "target_modules is None, not text or a list of text",
        "copy the file that peft wrote",
    ),
    "regex": (
        {"target_modules": "q_proj("},
        "'q_proj(' is no regular expression: missing ), unterminated subpattern at position 6",
        "correct it in the file",
    ),
    "dora with lora_bias": (
        {"use_dora": True, "lora_bias": True},
        "use_dora and lora_bias together, which peft does not define",
        "train with one of them",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_mean_something_else_are_refused(folder: Path, case: str) -> None:
    changes, message, hint = CONFIGS[case]
    edit_config(folder, **changes)
    assert refusal(folder) == (f"{folder / 'adapter_config.json'}: {message}", hint)


def test_every_key_of_pefts_config_is_known() -> None:
    """A key that a newer peft adds must be judged by a person."""
    from dataclasses import fields

    from edgeadapt.adapters.kinds import _lora_config as known

    keys = {field.name for field in fields(LoraConfig)}
    assert keys - known._HARMLESS - set(known._USED) - set(known._REFUSED) == set()


# Tensors


def test_no_lora_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda _: {"base_model.model.lm_head.weight": torch.ones(30, 16)})
    assert refusal(folder)[0] == f"{folder / 'adapter_model.safetensors'} holds no LoRA tensor"


def test_a_without_b(folder: Path) -> None:
    key = f"base_model.model.{Q0}.lora_B.weight"
    edit_tensors(folder, lambda tensors: {name: value for name, value in tensors.items() if name != key})
    assert refusal(folder) == (
        (
            f"tensor '{Q0}.lora_B.weight' is missing in {folder / 'adapter_model.safetensors'} "
            f"('{Q0}.lora_A.weight' is there)"
        ),
        "save the adapter again with peft's save_pretrained",
    )


def test_an_empty_shard(folder: Path) -> None:
    key = f"base_model.model.{Q0}.lora_A.weight"
    edit_tensors(folder, lambda tensors: {**tensors, key: torch.empty(0)})
    assert refusal(folder) == (
        (
            f"tensor '{key}' in {folder / 'adapter_model.safetensors'} is empty (shape [0]): a shard of a partitioned "
            "training was saved, not the whole"
        ),
        (
            "gather the shards before saving (ZeRO-3: deepspeed.zero.GatheredParameters; FSDP: summon_full_params), or "
            "convert the checkpoint"
        ),
    )


def test_a_magnitude_without_dora(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "llama", r=2, target_modules=["q_proj"], use_dora=True)
    edit_config(folder, use_dora=False)
    assert refusal(folder)[0] == (
        f"tensor 'base_model.model.{Q0}.lora_magnitude_vector' in {folder / 'adapter_model.safetensors'} does not fit "
        "its config: use_dora is False, lora_bias is False"
    )


def test_dora_without_a_magnitude(folder: Path) -> None:
    edit_config(folder, use_dora=True)
    assert refusal(folder)[0] == (
        f"tensor '{Q0}.lora_magnitude_vector' is missing in {folder / 'adapter_model.safetensors'} "
        f"('{Q0}.lora_A.weight' is there)"
    )


def test_integers_for_factors(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {key: value.to(torch.int8) for key, value in tensors.items()})
    message, hint = refusal(folder)
    assert message == (
        f"tensor 'base_model.model.{Q0}.lora_A.weight' in {folder / 'adapter_model.safetensors'} has dtype I8"
    )
    assert hint == "save the adapter in float32, float16 or bfloat16"


def test_two_adapters_in_one_file(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            key.replace(".weight", f".{name}.weight"): value for key, value in tensors.items() for name in ("a", "b")
        }

    edit_tensors(folder, lambda tensors: {key: value.clone() for key, value in add(tensors).items()})
    assert refusal(folder)[0] == f"{folder / 'adapter_model.safetensors'} holds the tensors of several adapters: a, b"


def test_one_tensor_twice(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {**tensors, f"{Q0}.lora_A.weight": torch.ones(2, 16)})
    assert refusal(folder)[0] == (
        f"tensors 'base_model.model.{Q0}.lora_A.weight' and '{Q0}.lora_A.weight' in "
        f"{folder / 'adapter_model.safetensors'} are both '{Q0}.lora_A.weight' and differ"
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(folder: Path, bad: float) -> None:
    key = f"base_model.model.{Q0}.lora_A.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[key][1, 3] = bad
        return tensors

    edit_tensors(folder, spoil)
    (adapter,) = read_adapters(folder)
    with pytest.raises(AdapterError) as caught:
        resolve(adapter, target_modules(build("llama")))
    assert caught.value.message == (
        f"adapter 'support': tensor '{key}' in {folder / 'adapter_model.safetensors'} holds values that are not "
        "finite: 1 of 32, the first at [1, 3]"
    )
    assert caught.value.hint == "the training diverged or the file is damaged: use an earlier checkpoint"


# The safetensors file


def _header(file: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_truncated_in_the_header(folder: Path, size: int) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    needed = int.from_bytes(file.read_bytes()[:8], "little")
    assert refusal(folder)[0] == (
        f"{file} is truncated or no safetensors file: its header needs {needed} bytes, the file has {size}"
    )


def test_truncated_in_the_data(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    header, data = _header(file)
    last = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"][1])
    file.write_bytes(file.read_bytes()[:-1])
    assert refusal(folder) == (
        f"{file} is truncated: tensor {last!r} ends at data byte {len(data)}, the file has {len(data) - 1}",
        "copy or download the adapter again; nothing can be repaired from this file",
    )


def test_bytes_after_the_end(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0" * 3)
    assert refusal(folder)[0] == f"{file} is damaged: 3 bytes after the last tensor"


DAMAGES: dict[str, tuple[Callable[[str], str], str]] = {
    "json": (lambda text: text[:-1], "has a damaged header: "),
    "list": (lambda _: "[]", "has a damaged header: no JSON object"),
    "twice": (lambda text: text[:-1] + ',"x":1,"x":2}', "has a damaged header: key 'x' twice"),
    "entry": (lambda text: text[:-1] + ',"x":1}', "has a damaged header entry for tensor 'x'"),
    "negative": (
        lambda text: text[:-1] + ',"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        "has a damaged header entry for tensor 'x'",
    ),
    "none": (lambda _: '{"__metadata__":{}}', "holds no tensor"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_header(folder: Path, case: str) -> None:
    change, message = DAMAGES[case]
    file = folder / "adapter_model.safetensors"
    header, data = _header(file)
    _write(file, change(json.dumps(header)).encode(), data)
    assert refusal(folder)[0].startswith(f"{file} {message}")


def test_overlapping_tensors(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    header, data = _header(file)
    keys = sorted(key for key in header if key != "__metadata__")
    header[keys[1]]["data_offsets"] = header[keys[0]]["data_offsets"]
    _write(file, json.dumps(header).encode(), data)
    assert refusal(folder)[0] == f"{file} is damaged: tensor {keys[1]!r} starts at data byte 0, not at 128"


def test_a_shape_that_does_not_fit_its_bytes(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    header, data = _header(file)
    key = f"base_model.model.{Q0}.lora_A.weight"
    header[key]["shape"] = [2, 17]
    _write(file, json.dumps(header).encode(), data)
    message = f"tensor '{key}' in {file} has 128 bytes, but its shape [2, 17] in F32 needs 136"
    assert refusal(folder)[0] == message


def test_unknown_dtype(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()})
    message, hint = refusal(folder)
    assert message.endswith(f"in {folder / 'adapter_model.safetensors'} has dtype F8_E4M3")
    assert hint == (
        "save the adapter in float32, float16 or bfloat16 (known: F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL)"
    )


def test_a_git_lfs_pointer(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert refusal(folder) == (f"{file} is a Git LFS pointer, not the tensors", "fetch them with `git lfs pull`")


def test_training_state_is_not_used(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "llama", r=2, target_modules=["q_proj"])
    expected = resolved_values(resolve(read_adapters(folder)[0], target_modules(build("llama"))))
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{Q0}.lora_velora_embed": torch.ones(4)}, file)
    edit_config(folder, velora_config={"num_groups": 4, "scale": 1.0})
    (adapter,) = read_adapters(folder)
    assert "velora_config acts in training only: its saved state is not used" in adapter.warnings
    measured = resolved_values(resolve(adapter, target_modules(build("llama"))))
    assert all(np.array_equal(measured[key], value) for key, value in expected.items())
