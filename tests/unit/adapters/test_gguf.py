"""What is read from llama.cpp's adapters, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgeadapt.adapters import read_adapters
from edgeadapt.adapters.layouts.gguf import rows_in_order
from edgeadapt.adapters.resolve import resolve
from edgeadapt.errors import AdapterError

K, UP = "blk.1.attn_k.weight", "blk.1.ffn_up.weight"
CONVERT = "copy or convert the adapter again"
AS_PEFT = "give the adapter as peft saved it"
PLACES = f"embeddings, norms and experts are not read from GGUF; {AS_PEFT}"
ENTRIES = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 3.0}


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


TENSORS = {
    f"{K}.lora_a": numbers(2, 32),
    f"{K}.lora_b": numbers(8, 2),
    f"{UP}.lora_a": numbers(2, 32),
    f"{UP}.lora_b": numbers(12, 2),
}


def write(
    folder: Path,
    entries: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    *,
    arch: str = "llama",
    kinds: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(str(folder / "mine.gguf"), arch)
    for key, value in (ENTRIES | (entries or {})).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_float32(key, value)
    for name, values in (TENSORS | (tensors or {})).items():
        if values is None:
            continue
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapters(folder)
    return f"{caught.value.message}\n{caught.value.hint}".replace(f"{folder}/", "")


def test_names_scale_and_rows(tmp_path: Path) -> None:
    (adapter,) = read_adapters(write(tmp_path / "mine"))
    assert (adapter.kind, adapter.layout, adapter.name) == ("lora", "gguf", "mine")
    assert adapter.config["lora_alpha"] / adapter.config["r"] == 1.5
    up, key = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.k_proj"
    np.testing.assert_array_equal(adapter.tensors[f"{up}.lora_A.weight"].read(), TENSORS[f"{UP}.lora_a"])
    placed = rows_in_order(adapter, 4)
    np.testing.assert_array_equal(placed.tensors[f"{up}.lora_B.weight"].read(), TENSORS[f"{UP}.lora_b"])
    order = [0, 2, 1, 3, 4, 6, 5, 7]  # two heads of 4, of two pairs each
    np.testing.assert_array_equal(placed.tensors[f"{key}.lora_B.weight"].read(), TENSORS[f"{K}.lora_b"][order])
    assert rows_in_order(placed, 4) is placed


def test_rows_out_of_order_are_not_resolved(tmp_path: Path) -> None:
    (adapter,) = read_adapters(write(tmp_path / "mine"))
    with pytest.raises(AdapterError, match="the rows of 1 modules are in GGUF's order, not the base's"):
        resolve(adapter, {})


def test_rows_stay_in_other_architectures(tmp_path: Path) -> None:
    (adapter,) = read_adapters(write(tmp_path / "mine", arch="qwen2"))
    assert rows_in_order(adapter, None) is adapter


@pytest.mark.parametrize("head_dim", [None, 3, 16])
def test_a_base_with_other_heads(head_dim: int | None, tmp_path: Path) -> None:
    (adapter,) = read_adapters(write(tmp_path / "mine"))
    with pytest.raises(AdapterError) as caught:
        rows_in_order(adapter, head_dim)
    assert caught.value.message == (
        f"adapter 'mine': the rows of '{K}.lora_b' (8) are interleaved by attention heads, and the base's have the "
        f"size {head_dim}"
    )


def test_alpha_0_is_a_scale_of_1(tmp_path: Path) -> None:
    (adapter,) = read_adapters(write(tmp_path / "mine", {"adapter.lora.alpha": 0.0}))
    assert adapter.config["lora_alpha"] / adapter.config["r"] == 1.0


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_other_types(kind: str, tmp_path: Path) -> None:
    qtype = gguf.GGMLQuantizationType[kind]
    name = f"{UP}.lora_a"
    (adapter,) = read_adapters(write(tmp_path / "mine", kinds={name: qtype}))
    expected = gguf.dequantize(gguf.quantize(TENSORS[name], qtype), qtype)
    found = adapter.tensors["model.layers.1.mlp.up_proj.lora_A.weight"].read()
    np.testing.assert_array_equal(found, expected.reshape(found.shape))


@pytest.mark.parametrize(
    ("entries", "tensors", "words"),
    [
        ({"adapter.type": "other"}, {}, "mine.gguf: adapter.type is 'other', not 'lora'\ngive a LoRA adapter"),
        (
            {"adapter.alora.invocation_tokens": [3, 4]},
            {},
            (
                "mine.gguf: adapter.alora.invocation_tokens is set: it acts only after its invocation tokens, which "
                "edgeadapt does not do\ntrain it without them"
            ),
        ),
        (
            {"adapter.lora.strange": 1.0},
            {},
            f"mine.gguf: unknown entry 'adapter.lora.strange': it may change what is computed\n{AS_PEFT}",
        ),
        (
            {"adapter.lora.alpha": "3"},
            {},
            f"mine.gguf: adapter.lora.alpha is '3', not a number of 0 or more\n{CONVERT}",
        ),
        ({}, {f"{K}.lora_a": None}, f"tensor '{K}.lora_a' is missing in mine.gguf ('{K}.lora_b' is there)\n{CONVERT}"),
        (
            {},
            {"blk.1.attn_norm.weight": numbers(32)},
            (
                "tensor 'blk.1.attn_norm.weight' in mine.gguf is no LoRA factor of an attention, feed-forward or "
                f"output layer\n{PLACES}"
            ),
        ),
        (
            {},
            {"token_embd.weight.lora_a": numbers(4, 2)},
            (
                "tensor 'token_embd.weight.lora_a' in mine.gguf is no LoRA factor of an attention, feed-forward or "
                f"output layer\n{PLACES}"
            ),
        ),
        (
            {},
            {f"{K}.lora_b": numbers(8, 3)},
            (
                f"tensors '{K}.lora_a' and '{K}.lora_b' in mine.gguf are no product of rank r: with r first and "
                "last their shapes are [2, 32] and [8, 3]\n"
                "copy the file again from where the adapter was trained; only linear layers are read in this layout"
            ),
        ),
    ],
)
def test_what_is_no_plain_lora(
    entries: dict[str, Any], tensors: dict[str, np.ndarray | None], words: str, tmp_path: Path
) -> None:
    assert refusal(write(tmp_path / "mine", entries, tensors)) == words


def test_architectures_with_other_names(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "mine", arch="gpt2")) == (
        "mine.gguf: an adapter for the architecture 'gpt2' is not read from GGUF\n"
        f"known: gemma, gemma2, gemma3, llama, qwen2, qwen3; {AS_PEFT}"
    )


def test_damaged_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine")
    file = folder / "mine.gguf"
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    assert refusal(folder) == (
        f"tensor '{UP}.lora_b' of shape [12, 2] does not fit into mine.gguf, which has {len(content) - 40} bytes\n"
        f"{CONVERT}"
    )
    file.write_bytes(b"GGUX" + content[4:])
    assert refusal(folder) == f"mine.gguf is no readable GGUF file: it does not begin with GGUF\n{CONVERT}"
    write(folder, tensors={f"{UP}.lora_b": np.full((12, 2), np.nan, np.float32)})
    (adapter,) = read_adapters(folder)
    with pytest.raises(AdapterError, match="not finite: 24 of 24"):
        adapter.tensors["model.layers.1.mlp.up_proj.lora_B.weight"].read()


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {"general.type": "model"})
    with pytest.raises(AdapterError, match="holds no adapter"):
        read_adapters(folder)
