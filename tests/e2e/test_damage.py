"""Damaged files of every layout but peft's: refused before anything is written, saying what, where and what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from edgeadapt.conversion.formats.gguf import dump_gguf
from edgeadapt.errors import AdapterError
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.load import load_base_model
from edgeadapt.onnx_adapter import read_onnx_adapter
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from tests.e2e.conftest import Tiny
from tests.e2e.reference import base_model
from tests.e2e.test_layouts import ALPHA, RANK, gguf, kohya, mlx, olive
from tests.e2e.tiny import LLAMA, save_adapter

Tensors = dict[str, np.ndarray]


def hub(_peft: Path, folder: Path, base: Path) -> Path:
    """Let AdapterHub's library save a bottleneck."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    adapters.init(model)
    model.add_adapter("hub", config=adapters.SeqBnConfig(reduction_factor=8))
    model.save_adapter(str(folder), "hub", use_safetensors=True)
    return folder


def read_gguf(file: Path) -> Tensors:
    import gguf as library

    return {tensor.name: np.array(tensor.data) for tensor in library.GGUFReader(file).tensors}


def write_gguf(tensors: Mapping[str, np.ndarray], file: Path) -> None:
    entries = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    file.write_bytes(dump_gguf({**entries, "adapter.lora.alpha": float(ALPHA)}, tensors))


def write_onnx(tensors: Mapping[str, np.ndarray], file: Path) -> None:
    """Write by ONNX Runtime, which takes what our own writer refuses."""
    writer = onnxruntime.AdapterFormat()
    writer.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in tensors.items()})
    writer.export_adapter(str(file))


@dataclass(frozen=True)
class Layout:
    """How a layout's files are made and changed, and what its tensors are called.

    second: the second factor at one module; absent: what is said to be missing without it
    foreign: a prefix, and what no base has in its place
    """

    make: Callable[[Path, Path, Path], Path]
    file: str
    read: Callable[[Path], Tensors]
    write: Callable[[Tensors, Path], None]
    second: str
    absent: str
    foreign: tuple[str, str]


def of_peft(write: Callable[[Path, Path], Path], peft: Path, folder: Path, _base: Path) -> Path:
    return write(peft, folder)


def read_onnx(file: Path) -> Tensors:
    return {name: np.array(value) for name, value in read_onnx_adapter(file).tensors.items()}


MODULE = "model.layers.1.mlp.up_proj"
FLAT = f"lora_te_{MODULE.replace('.', '_')}"
PLACE = "model.layers.1.output_adapters.adapters"
HUB, GGUF = "adapter.safetensors", "lora.gguf"
MLX, KOHYA, OLIVE = "adapters.safetensors", "last.safetensors", "adapter_weights.onnx_adapter"
LAYOUTS = {
    "adapterhub": Layout(
        *(hub, HUB, load_file, save_file),
        *(f"{PLACE}.hub.adapter_up.weight", f"'{PLACE}.adapter_up.weight'", ("model.", "visual.")),
    ),
    "gguf": Layout(
        *(partial(of_peft, gguf), GGUF, read_gguf, write_gguf),
        *("blk.1.ffn_up.weight.lora_b", "'blk.1.ffn_up.weight.lora_b'", ("blk.", "enc.blk.")),
    ),
    "kohya": Layout(
        *(partial(of_peft, kohya), KOHYA, load_file, save_file),
        *(f"{FLAT}.lora_up.weight", f"'{FLAT}.lora_up.weight'", ("lora_te_model", "lora_te_visual")),
    ),
    "mlx": Layout(
        *(partial(of_peft, mlx), MLX, load_file, save_file),
        *(f"{MODULE}.lora_b", f"'{MODULE}.lora_b'", ("model.", "visual.")),
    ),
    "onnx_adapter": Layout(
        *(partial(of_peft, olive), OLIVE, read_onnx, write_onnx),
        *(f"{MODULE}.lora_B.weight", f"lora_B of module '{MODULE}'", ("model.", "visual.")),
    ),
}


@pytest.fixture(scope="module")
def llama(tiny: Callable[[str], Tiny]) -> tuple[Path, BaseModel]:
    base = tiny("llama").base
    return base, load_base_model(base, task="text-generation")


@pytest.fixture(scope="module")
def sound(llama: tuple[Path, BaseModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a sound adapter of each layout."""
    root = tmp_path_factory.mktemp("sound")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LLAMA)
    peft = save_adapter(base_model("llama", llama[0]), config, root / "peft")
    return {name: layout.make(peft, root / name, llama[0]) for name, layout in LAYOUTS.items()}


def truncated(file: Path, layout: Layout, _tensors: Tensors) -> list[str]:
    file.write_bytes(file.read_bytes()[:-100])
    # what ends there is the last tensor, but in .onnx_adapter files, whose order is not the data's
    return [str(file), "ends at byte" if layout.file == OLIVE else "tensor '"]


def not_finite(file: Path, layout: Layout, tensors: Tensors) -> list[str]:
    value = tensors[layout.second].copy()
    value[1, 1] = np.nan
    layout.write({**tensors, layout.second: value}, file)
    return [str(file), f"tensor '{layout.second}'", "NaN" if layout.file == OLIVE else "not finite: 1 of "]


def missing(file: Path, layout: Layout, tensors: Tensors) -> list[str]:
    layout.write({name: value for name, value in tensors.items() if name != layout.second}, file)
    return [str(file), "is missing", layout.absent]


def extra(file: Path, layout: Layout, tensors: Tensors) -> list[str]:
    layout.write({**tensors, "strange.thing": np.ones((2, 2), np.float32)}, file)
    return [str(file), "tensor 'strange.thing'"]


def foreign(file: Path, layout: Layout, tensors: Tensors) -> list[str]:
    old, new = layout.foreign
    layout.write({name.replace(old, new, 1): value for name, value in tensors.items()}, file)
    return [f"'{new}", "no LoRA factor" if layout.file == GGUF else "the base"]


def wrong_shape(file: Path, layout: Layout, tensors: Tensors) -> list[str]:
    """Double the longer axis: another number of features, the same rank."""
    value = tensors[layout.second]
    layout.write({**tensors, layout.second: np.concatenate([value] * 2, int(np.argmax(value.shape)))}, file)
    if layout.file == HUB:
        return ["the bottleneck at model.layers.1.output_adapters is [64, 8] and [8, 128]", "need [64, 8] and [8, 64]"]
    return [f"tensor '{layout.second}' in {file} has shape [192, 4]", f"'{MODULE}'", "needs [96, 4]"]


def other_revision(file: Path, layout: Layout, _tensors: Tensors) -> list[str]:
    place = "model.layers.1.mlp.down_proj" if layout.file == HUB else MODULE
    stamp: dict[str, Any] = {"schema": "edgeadapt.base/1", "name": "some/base", "revision": "old", "quantization": None}
    stamp["parameters"] = {f"{place}.weight": "0" * 64}
    (file.parent / "base_fingerprint.json").write_text(json.dumps(stamp))
    return [f"tensor '{place}.weight' has digest ", "000000000000 in base 'some/base' at revision old"]


DAMAGES = (truncated, not_finite, missing, extra, foreign, wrong_shape, other_revision)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", LAYOUTS)
def test_damage(name: str, damage: Any, sound: dict[str, Path], llama: tuple[Path, BaseModel], tmp_path: Path) -> None:
    layout, folder = LAYOUTS[name], Path(shutil.copytree(sound[name], tmp_path / "damaged"))
    words = damage(folder / layout.file, layout, layout.read(folder / layout.file))
    before = {file: file.read_bytes() for file in folder.iterdir()}
    recipe = Recipe((folder,), str(llama[0]), tmp_path / "out.bundle", quantize="none")
    with pytest.raises(AdapterError) as caught:
        export_bundle(recipe, base=llama[1])
    assert [part for part in words if part not in caught.value.message] == [], caught.value.message
    assert re.search(r"\b(give|copy|save|convert|use)\b", caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
