"""Adapters written for other programs: read back to the bit, and what cannot be written refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from peft import IA3Config, LoHaConfig, LoraConfig

from edgeadapt import convert_adapter
from edgeadapt.adapters import read_adapters
from edgeadapt.adapters.adapter import ResolvedAdapter
from edgeadapt.conversion.formats.gguf import dump_gguf
from edgeadapt.errors import AdapterError
from edgeadapt.merging.load import load_base_model
from edgeadapt.pipeline.inputs import in_order_of, resolve_on
from tests.e2e.conftest import Invoke, Tiny
from tests.e2e.reference import base_model
from tests.e2e.test_layouts import gguf as library_writes
from tests.e2e.tiny import LLAMA, save_adapter

INSTEAD = "edgeadapt export makes a bundle that holds it; for llama.cpp merge it into the base and convert that"
RANKS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"v_proj": 5}}
WRITTEN: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "ranks": {"r": 4, "lora_alpha": 6, "use_rslora": True, **RANKS},
    "lm_head": {"r": 4, "target_modules": ["lm_head", "k_proj"]},
}
BLOCK = "model.layers.0"


def resolved(base: Any, folder: Path) -> ResolvedAdapter:
    return resolve_on(base, in_order_of(base, read_adapters(folder))[0])


def peft(tiny: Tiny, folder: Path, options: dict[str, Any]) -> Path:
    config = LoraConfig(**{"target_modules": LLAMA, **options})
    return save_adapter(base_model("llama", tiny.base), config, folder)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_reads_back_to_the_bit(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    llama, back = tiny("llama"), tmp_path / "back"
    base, source = load_base_model(llama.base), peft(llama, tmp_path / name, WRITTEN[name])
    back.mkdir()
    made = convert_adapter(source, base, back / "mine.gguf", to="gguf")
    expected, found = resolved(base, source), resolved(base, back)
    assert expected.sites.keys() == found.sites.keys()
    for path, update in expected.sites.items():
        np.testing.assert_array_equal(found.sites[path].a, update.a)
        np.testing.assert_array_equal(found.sites[path].b, update.b)
    assert made.facts["alpha"] == (0.0 if name == "ranks" else 4.0)
    assert made.facts["rounding"] == 0.0


def test_it_is_what_the_library_writes(tiny: Callable[[str], Tiny], invoke: Invoke, tmp_path: Path) -> None:
    llama, mine = tiny("llama"), tmp_path / "mine.gguf"
    source = peft(llama, tmp_path / "sql", WRITTEN["lora"])
    shown = invoke("convert", source, "--base", llama.base, "--to", "gguf", "-o", mine, "--json")
    theirs = gguf.GGUFReader(library_writes(source, tmp_path / "theirs") / "lora.gguf")
    reader = gguf.GGUFReader(mine)
    fields = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": "sql",
        "general.base_model.count": 1,
        "general.base_model.0.name": llama.base.name,
        "adapter.lora.alpha": 4.0,
        "general.quantization_version": 2,
    }
    wanted = {tensor.name: tensor.data * (1.5 if tensor.name.endswith("b") else 1) for tensor in theirs.tensors}
    assert {tensor.name for tensor in reader.tensors} == wanted.keys()
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, wanted[tensor.name], err_msg=tensor.name)
    assert json.loads(shown.stdout) == {
        "path": str(mine),
        "adapter": "sql",
        "format": "gguf",
        "dtype": "f32",
        "bytes": mine.stat().st_size,
        "architecture": "llama",
        "modules": 14,
        "alpha": 4.0,
        "largest_rank": 4,
        "rounding": 0.0,
    }


def test_any_kind_that_is_a_product_and_halves(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    llama = tiny("llama")
    config = LoHaConfig(r=2, alpha=2, target_modules=["q_proj"])
    source = save_adapter(base_model("llama", llama.base), config, tmp_path / "loha")
    (tmp_path / "back").mkdir()
    base = load_base_model(llama.base)
    made = convert_adapter(source, base, tmp_path / "back" / "loha.gguf", to="gguf", dtype="f16")
    assert made.facts["largest_rank"] == 4
    assert 0 < made.facts["rounding"] <= 2.0**-11
    expected, found = resolved(base, source), resolved(base, tmp_path / "back")
    for path, update in expected.sites.items():
        change = update.a @ update.b
        assert np.abs(found.sites[path].a @ found.sites[path].b - change).max() <= 2e-3 * np.abs(change).max()


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "dora": (
        "llama",
        {"use_dora": True, "target_modules": ["q_proj"]},
        (
            "adapter 'mine' has outputs or inputs that are scaled (DoRA, IA3 and the like), which a LoRA file of "
            f"llama.cpp cannot hold: '{BLOCK}.self_attn.q_proj', 'model.layers.1.self_attn.q_proj'"
        ),
        INSTEAD,
    ),
    "bias": (
        "llama",
        {"lora_bias": True, "target_modules": ["q_proj"]},
        (
            "adapter 'mine' has biases, which a LoRA file of llama.cpp cannot hold: "
            f"'{BLOCK}.self_attn.q_proj', 'model.layers.1.self_attn.q_proj'"
        ),
        INSTEAD,
    ),
    "saved": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        (
            "adapter 'mine' has parameters trained whole (modules_to_save), which a LoRA file of llama.cpp cannot "
            "hold: 'lm_head.weight'"
        ),
        INSTEAD,
    ),
    "embedding": (
        "llama",
        {"target_modules": ["embed_tokens"]},
        (
            "adapter 'mine' changes 'model.embed_tokens' (Embedding), which is no attention, feed-forward or output "
            "layer that a LoRA file of llama.cpp names"
        ),
        f"train without it; {INSTEAD}",
    ),
    "tied": (
        "llama-tied",
        {"target_modules": ["lm_head"]},
        (
            "adapter 'mine' changes 'lm_head', which shares its weight with the embedding of {base}: llama.cpp has no "
            "such layer then"
        ),
        f"train without lm_head; {INSTEAD}",
    ),
    "gpt2": (
        "gpt2",
        {"target_modules": ["c_attn"]},
        "{base} is a model of the type 'gpt2', for which LoRA is not written as GGUF",
        "known: gemma, gemma2, gemma3_text, llama, mistral, qwen2, qwen3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_hold(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    model, options, message, hint = REFUSED[name]
    folder = tiny(model).base
    source = save_adapter(base_model(model, folder), LoraConfig(r=4, **options), tmp_path / "mine")
    before = {file: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(AdapterError) as caught:
        convert_adapter(source, folder, tmp_path / "mine.gguf", to="gguf")
    assert (caught.value.message, caught.value.hint) == (message.format(base=folder.name), hint)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert {file: file.read_bytes() for file in source.iterdir()} == before


def test_scaled_inputs_alone_are_refused_too(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    config = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False)
    source = save_adapter(base_model("llama", tiny("llama").base), config, tmp_path / "mine")
    with pytest.raises(AdapterError) as caught:
        convert_adapter(source, tiny("llama").base, tmp_path / "mine.gguf", to="gguf")
    assert caught.value.message == (
        "adapter 'mine' has outputs or inputs that are scaled (DoRA, IA3 and the like), which a LoRA file of llama.cpp "
        f"cannot hold: '{BLOCK}.mlp.down_proj', 'model.layers.1.mlp.down_proj'"
    )


def test_a_number_too_large_for_halves(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    llama = tiny("llama")
    source = peft(llama, tmp_path / "mine", {"r": 4, "lora_alpha": 4 * 10**7, "target_modules": ["v_proj"]})
    with pytest.raises(AdapterError, match=r"'blk\.0\.attn_v\.weight\.lora_b' holds .*, too large for float16"):
        convert_adapter(source, llama.base, tmp_path / "mine.gguf", to="gguf", dtype="f16")


def test_targets_formats_and_force(tiny: Callable[[str], Tiny], invoke: Invoke, tmp_path: Path) -> None:
    llama, target = tiny("llama"), tmp_path / "mine.gguf"
    target.write_bytes(b"mine")
    command = ("convert", llama.adapters[1], "--base", llama.base, "--to", "gguf", "-o")
    taken = invoke(*command, target)
    assert (taken.exit_code, taken.stderr) == (
        1,
        f"error: {target} exists already\nhint: choose another target, or replace it with --force\n",
    )
    assert target.read_bytes() == b"mine"
    folder = invoke(*command, tmp_path, "--force")
    assert folder.stderr == f"error: {tmp_path} is a folder\nhint: give the name of the file to write\n"
    assert invoke(*command, target, "--force", "--quiet").exit_code == 0
    first = target.read_bytes()
    assert invoke(*command, target, "--force", "--quiet").exit_code == 0
    assert (first[:4], first == target.read_bytes()) == (b"GGUF", True)
    for options, words in (({"to": "oops"}, "unknown format 'oops'"), ({"dtype": "q4"}, "not written in 'q4'")):
        with pytest.raises(AdapterError, match=words):
            convert_adapter(llama.adapters[1], llama.base, tmp_path / "other.gguf", **{"to": "gguf", **options})


def test_every_tensor_lies_where_the_file_says(tmp_path: Path) -> None:
    tensors = {f"t{n}": np.arange(n, dtype="<f2" if n % 2 else "<f4").reshape(1, n) for n in (1, 7, 8, 9, 40)}
    file = tmp_path / "some.gguf"
    file.write_bytes(dump_gguf({"general.architecture": "llama", "x": 7, "y": 0.5, "ä": "ö"}, tensors))
    reader = gguf.GGUFReader(file)
    assert [reader.fields[key].contents() for key in ("x", "y", "ä")] == [7, 0.5, "ö"]
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data.reshape(1, -1), tensors[tensor.name])
