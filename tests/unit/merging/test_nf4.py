"""NF4 against values by hand, against bitsandbytes where it is installed, and in folders and merges."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from edgeadapt.adapters import resolve
from edgeadapt.errors import BaseModelError, MergeError
from edgeadapt.merging import nf4
from edgeadapt.merging.load import load_base_model
from edgeadapt.merging.merge import check_merge, merge
from edgeadapt.merging.quantized_base import (
    as_nf4,
    base_for_merge,
    merge_error_ratio,
    summary_of_ratios,
    trained_on_nf4,
)
from edgeadapt.merging.reference import model_outputs

from .conftest import cases_for

CODE = torch.tensor(nf4.CODE)


def test_the_nearest_of_sixteen_values_by_hand():
    # One block with absmax 2: quotients 1, -1, 0.3, 0.29, -0.04; midpoints 0.292027 (0.24611, 0.33792) and -0.045525.
    weight = torch.zeros(64)
    weight[:5] = torch.tensor([2.0, -2.0, 0.6, 0.58, -0.08])
    got = nf4.as_trained_on_nf4(weight)
    # One block's absmax is its own mean, so double quantization keeps it.
    want = 2 * torch.tensor([1.0, -1.0, 0.33791524171829224, 0.24611230194568634, 0.0])
    torch.testing.assert_close(got[:5], want, rtol=1e-6, atol=0)
    assert torch.equal(got[5:], torch.zeros(59))


def test_double_quantization_by_hand():
    # Mean 2, differences -1, 0, 1; nested absmax 1. -1 is not in the code: its lowest entry is -0.9929687.
    got = nf4.double_quantized(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(got, torch.tensor([2 - 0.99296875, 2.0, 3.0]), rtol=1e-6, atol=0)


def test_the_dynamic_code():
    code = nf4.dynamic_code()
    assert code.shape == (256,)
    assert torch.equal(code, code.sort().values)
    assert code.unique().numel() == 256
    assert float(code[-1]) == 1.0
    assert float(code[code > 0].min()) == pytest.approx(5.5e-7)  # the middle of 0.1 and 1, times 1e-6


def test_a_second_round_changes_nothing_of_the_grid():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    once = nf4.as_trained_on_nf4(weight)
    assert once.shape == weight.shape
    error = float((once - weight).norm() / weight.norm())
    assert 0.08 < error < 0.11  # 9.2 to 9.8 % on normal weights


def packed(name: str, weight: torch.Tensor, dtype: str = "float32", nested: bool = True) -> dict[str, torch.Tensor]:
    """Return a weight as bitsandbytes saves it: low-level parts, written here by hand."""
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    indices = nf4.nearest(blocks / absmax[:, None], CODE).reshape(-1, 2).to(torch.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(weight.shape)}
    parts = {"": (indices[:, :1] << 4 | indices[:, 1:]), ".quant_map": CODE.clone()}
    if nested:
        code, offset = nf4.dynamic_code(), absmax.mean()
        scale = (absmax - offset).abs().amax()
        parts[".absmax"] = nf4.nearest((absmax - offset) / scale, code).to(torch.uint8)
        parts[".nested_absmax"] = scale[None]
        parts[".nested_quant_map"] = code
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        parts[".absmax"] = absmax
    parts[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name + suffix: value.contiguous() for suffix, value in parts.items()}


@pytest.fixture
def nf4_folder(folder_of, tmp_path):
    """Return a llama folder whose projections are NF4 as transformers saves it."""
    folder = tmp_path / "llama-bnb-4bit"
    shutil.copytree(folder_of("llama"), folder)
    state = load((folder / "model.safetensors").read_bytes())
    result: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        result |= packed(key, value) if "_proj" in key else {key: value}
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_in_nf4_is_the_same_as_rounding_the_original(nf4_folder, folder_of):
    stored = load_base_model(nf4_folder)
    rounded = load_base_model(folder_of("llama"), quantize_as="nf4")
    original = load_base_model(folder_of("llama"))
    assert stored.quantized_from == rounded.quantized_from == "nf4"
    assert original.quantized_from is None
    assert b"quantization_config" not in stored.assets["config.json"]
    changed = [path for path in original.modules if original.modules[path].digest != stored.modules[path].digest]
    assert len(changed) == 14
    assert all(path.endswith("_proj") for path in changed)
    for path, module in stored.modules.items():
        np.testing.assert_allclose(module.weight(), rounded.modules[path].weight(), rtol=1e-6, atol=1e-9)


def test_without_double_quantization_and_in_bfloat16():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    got = nf4.dequantize_state({**packed("w.weight", weight, "bfloat16", nested=False), "b": torch.ones(2)}, "here")
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    exact = (CODE[nf4.nearest(blocks / absmax, CODE)] * absmax).reshape(32, 64)
    assert sorted(got) == ["b", "w.weight"]
    torch.testing.assert_close(got["w.weight"], exact.bfloat16().float(), rtol=0, atol=0)
    assert not torch.equal(got["w.weight"], exact)


def test_conv1d_is_turned(folder_of):
    """bitsandbytes quantizes GPT-2's weights in the layout [out, in]."""
    original, rounded = load_base_model(folder_of("gpt2")), load_base_model(folder_of("gpt2"), quantize_as="nf4")
    weight = original.modules["transformer.h.0.mlp.c_fc"].weight()
    want = nf4.as_trained_on_nf4(torch.from_numpy(weight.T.copy())).numpy().T
    got = rounded.modules["transformer.h.0.mlp.c_fc"].weight()
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(got, nf4.as_trained_on_nf4(torch.from_numpy(weight.copy())).numpy())
    assert rounded.modules["lm_head"].digest == original.modules["lm_head"].digest
    assert rounded.module.lm_head.weight is rounded.module.transformer.wte.weight


def test_a_classification_head_stays(base_of):
    base = base_of("bert-classifier")
    rounded = as_nf4(base)
    same = [path for path in base.modules if base.modules[path].digest == rounded.modules[path].digest]
    assert "classifier" in same
    assert "bert.pooler.dense" not in same
    assert "bert.encoder.layer.1.output.dense" not in same


def error_of(folder):
    with pytest.raises(BaseModelError) as caught:
        load_base_model(folder)
    return str(caught.value).replace(str(folder), "FOLDER")


def test_damaged_and_foreign_quantization(nf4_folder):
    state = load((nf4_folder / "model.safetensors").read_bytes())
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({k: v for k, v in state.items() if k != f"{name}.absmax"}, nf4_folder / "model.safetensors")
    assert error_of(nf4_folder) == (
        f"FOLDER: the NF4 weight {name} is damaged: {name}.absmax is missing\nHint: download or save the folder again"
    )
    save_file({**state, f"{name}.absmax": state[f"{name}.absmax"][:-1]}, nf4_folder / "model.safetensors")
    assert error_of(nf4_folder) == (
        f"FOLDER: the NF4 weight {name} is damaged: 1024 values and 15 blocks for shape [32, 32]\n"
        "Hint: download or save the folder again"
    )
    save_file({k: v for k, v in state.items() if "_proj" not in k}, nf4_folder / "model.safetensors")
    assert error_of(nf4_folder) == (
        "FOLDER: config.json says 4-bit bitsandbytes, but the files hold no such tensor\n"
        "Hint: the folder was not saved completely; download or save it again"
    )
    config = json.loads((nf4_folder / "config.json").read_text())
    entries = {
        "gptq": {"quant_method": "gptq", "bits": 4},
        "awq": {"quant_method": "awq"},
        "fp8": {"quant_method": "fp8"},
        "bitsandbytes int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "bitsandbytes fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    for method, entry in entries.items():
        (nf4_folder / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
        assert error_of(nf4_folder) == (
            f"FOLDER: the weights are quantized with {method}\n"
            "Hint: only NF4 (bitsandbytes) is read; give the folder of the unquantized model"
        )


def test_which_base_an_adapter_is_merged_into(nf4_folder, base_of, adapt):
    base = base_of("llama")
    plain = adapt("llama", target_modules=["q_proj"], r=2)
    reference = type(plain.base)
    stamped = type(plain)(**{**vars(plain), "base": reference(name="x", quantization="nf4")})
    named = type(plain)(**{**vars(plain), "base": reference(name="unsloth/llama-3-8b-bnb-4bit")})
    assert [trained_on_nf4(adapter) for adapter in (plain, stamped, named)] == [False, True, True]
    assert base_for_merge(base, plain) is base
    assert base_for_merge(base, stamped).quantized_from == "nf4"
    assert base_for_merge(base, named).quantized_from == "nf4"
    assert base_for_merge(base, named, "original") is base
    assert base_for_merge(base, plain, "dequantized").quantized_from == "nf4"
    stored = load_base_model(nf4_folder)
    assert base_for_merge(stored, plain) is stored
    with pytest.raises(MergeError) as caught:
        base_for_merge(stored, plain, "original")
    assert str(caught.value) == (
        "llama-bnb-4bit holds only NF4 weights, so adapter 'adapter' cannot be merged into the original\n"
        "Hint: give the full-precision model as base, or merge into the dequantized one"
    )
    with pytest.raises(MergeError) as caught:
        base_for_merge(base, plain, "best")
    assert str(caught.value) == "unknown merge base 'best'\nHint: known: dequantized, original"


def test_a_merge_into_nf4_equals_the_forward_that_was_trained(base_of, adapt):
    base = base_of("llama")
    trained_on = as_nf4(base)
    cases = cases_for(base)
    adapter = adapt(trained_on, target_modules=["q_proj", "down_proj"], r=4)
    resolved = resolve(adapter, trained_on.modules)
    merged = merge(trained_on, resolved)
    assert check_merge(trained_on, adapter, merged, cases, 1e-5) <= 1e-5
    with pytest.raises(MergeError, match="did not reproduce"):
        check_merge(trained_on, adapter, merge(base, resolve(adapter, base.modules)), cases, 1e-5)
    ratios = merge_error_ratio(base, trained_on, resolved)
    assert sorted(ratios) == sorted(resolved.sites)
    path = next(iter(ratios))
    weight, rounded = base.modules[path].weight(), trained_on.modules[path].weight()
    update = resolved.sites[path]
    want = np.linalg.norm(weight - rounded) / np.linalg.norm(update.a @ update.b)
    assert ratios[path] == pytest.approx(want, rel=1e-4)
    assert summary_of_ratios(ratios).startswith("rounding of the base against the adapter's change: median ")
    with pytest.raises(MergeError, match="NF4 rounded no module that adapter 'adapter' changes"):
        merge_error_ratio(base, base, resolved)
    assert not np.array_equal(
        model_outputs(base, base.module, cases[0])["logits"],
        model_outputs(trained_on, trained_on.module, cases[0])["logits"],
    )


def test_against_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(100, 192, generator=torch.Generator().manual_seed(0)) * 0.02
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    want = functional.dequantize_4bit(codes, state)
    got = nf4.as_trained_on_nf4(weight)
    assert torch.equal(functional.create_dynamic_map(), nf4.dynamic_code())
    # Rows of whole blocks: the library's CPU kernel (0.50) dequantizes others with the wrong absmax. It also takes
    # the farther neighbour where an absmax lies within 0.1 % of a midpoint.
    assert float(((got - want).abs() > 1e-6 * want.abs()).float().mean()) < 0.02
    assert float((got - want).abs().max()) < 0.01 * float(weight.abs().max())
