"""What is read from ONNX Runtime's adapter files, and what is refused with which words."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeadapt.adapters import read_adapters
from edgeadapt.adapters.adapter import ResolvedAdapter, TargetModule
from edgeadapt.adapters.read import fit_to_base
from edgeadapt.adapters.resolve import resolve
from edgeadapt.bundle.stored import to_stored
from edgeadapt.errors import AdapterError
from edgeadapt.onnx_adapter import dump_onnx_adapter

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
AGAIN = "copy or write the file again from where the adapter was trained"
PLAIN = "only LoRA's two factors are read from this format; give the adapter as it was trained"


def linear(path: str, inputs: int, outputs: int) -> TargetModule:
    return TargetModule(path, "linear", "Linear", (outputs, inputs), inputs, outputs, has_bias=False, digest="0")


MODULES = {path: linear(path, *shape) for path, shape in ((Q, (6, 6)), (UP, (6, 10)))}


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


QA, QB, UPA, UPB = numbers(6, 2), numbers(2, 6), numbers(6, 3), numbers(3, 10)


def write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_weights.onnx_adapter").write_bytes(dump_onnx_adapter(tensors))
    return folder


def resolved(folder: Path) -> ResolvedAdapter:
    (adapter,) = read_adapters(folder)
    fitted = fit_to_base(adapter, MODULES, None)
    return resolve(fit_to_base(fitted, MODULES, None), MODULES)


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        resolved(folder)
    return f"{caught.value.message}\n{caught.value.hint}".replace(f"{folder}/", "")


def named(form: str, *, attention: str = "self_attn", prefix: str = "") -> dict[str, np.ndarray]:
    q = prefix + Q.replace("self_attn", attention)
    factors = {(q, "A"): QA, (q, "B"): QB, (prefix + UP, "A"): UPA, (prefix + UP, "B"): UPB}
    return {form.format(module, part): value for (module, part), value in factors.items()}


FORMS = {
    "olive convert-adapters": named("{}.lora_{}.weight"),
    "olive on torchscript": named("{}.lora_{}.weight", prefix="base_model.model."),
    "olive on dynamo": named("{}.lora_{}.default.weight"),
    "not folded": {name: value.T.copy() for name, value in named("{}.lora_{}.default.weight").items()},
    "genai": named("{}.lora_{}.MatMul.weight", attention="attn"),
    "edgeadapt": named("{}.lora_{}"),
    "without its class": {name.removeprefix("model."): value for name, value in named("{}.lora_{}.weight").items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_names_and_axes(form: str, tmp_path: Path) -> None:
    (adapter,) = read_adapters(write(tmp_path / "mine", FORMS[form]))
    assert (adapter.kind, adapter.layout, adapter.name) == ("lora", "onnx_adapter", "mine")
    sites = resolved(tmp_path / "mine").sites
    assert sites.keys() == {Q, UP}
    for path, a, b in ((Q, QA, QB), (UP, UPA, UPB)):
        np.testing.assert_array_equal(sites[path].a, a)
        np.testing.assert_array_equal(sites[path].b, b)


def test_what_a_bundle_holds(tmp_path: Path) -> None:
    for dtype, tolerance in (("float32", 0.0), ("float16", 2**-10), ("int8", 2**-7)):
        sites = resolved(write(tmp_path / dtype, to_stored(named("{}.lora_{}"), dtype))).sites
        for path, a, b in ((Q, QA, QB), (UP, UPA, UPB)):
            assert np.abs(sites[path].a - a).max() <= tolerance * np.abs(a).max()
            assert np.abs(sites[path].b - b).max() <= tolerance * np.abs(b).max()


def test_squares_are_told_by_the_base_or_by_their_names(tmp_path: Path) -> None:
    a, b = numbers(6, 6), numbers(6, 6)
    sites = resolved(write(tmp_path / "mine", {f"{Q}.lora_A": a, f"{Q}.lora_B": b})).sites
    np.testing.assert_array_equal(sites[Q].a, a)
    keys = [f"{Q}.lora_{part}.default.weight" for part in "AB"]
    assert refusal(write(tmp_path / "open", dict(zip(keys, (a, b), strict=True)))) == (
        f"tensors '{keys[0]}' and '{keys[1]}' in adapter_weights.onnx_adapter are [6, 6]: whether they are transposed "
        "is said neither by their shapes nor by their names\ngive the adapter as peft saved it"
    )


def test_the_rest_of_a_bundle_is_no_adapter(tmp_path: Path) -> None:
    folder = write(tmp_path / "graph", FORMS["edgeadapt"])
    (folder / "adapter_weights.onnx_adapter").rename(folder / "residual.onnx_adapter")
    assert refusal(folder).startswith(f"{folder} holds no adapter")


def test_several_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", FORMS["edgeadapt"])
    (folder / "other.onnx_adapter").write_bytes(b"")
    assert refusal(folder) == (
        f"{folder} holds several adapters: adapter_weights.onnx_adapter, other.onnx_adapter\n"
        "give each a folder of its own"
    )


FILE = "adapter_weights.onnx_adapter"
FLOATS = "write it in float32 or float16 (Olive's convert-adapters without --quantize_int4)"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {f"{Q}.lora_magnitude_vector": numbers(6)},
            f"tensor '{Q}.lora_magnitude_vector' in {FILE} is no factor of a LoRA adapter\n{PLAIN}",
        ),
        ({f"{Q}.gain": numbers(6)}, f"tensor '{Q}.gain' in {FILE} is no factor of a LoRA adapter\n{PLAIN}"),
        (
            {f"{Q}.lora_A.default.weight": QA},
            f"tensors '{Q}.lora_A.default.weight' and '{Q}.lora_A.weight' in {FILE} are one\n{AGAIN}",
        ),
        (
            {"model.layers.0.self_attn.v_proj.lora_B.weight": QB},
            (
                f"the factor lora_A of module 'model.layers.0.self_attn.v_proj' is missing in {FILE} "
                f"('model.layers.0.self_attn.v_proj.lora_B.weight' is there)\n{AGAIN}"
            ),
        ),
        (
            {f"{Q}.lora_A.weight": np.ones((6, 2), np.int8)},
            (
                f"tensor '{Q}.lora_A.weight' in {FILE} is int8 without a scale '{Q}.lora_A.weight.scale' that fits\n"
                f"{AGAIN}"
            ),
        ),
    ],
)
def test_what_is_no_plain_lora(tensors: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "mine", FORMS["olive convert-adapters"] | tensors)) == words


def test_factors_of_four_bits_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {f"{Q}.lora_A.quant.weight": np.ones((6, 2), np.int8)})
    file = folder / FILE
    data = bytearray(file.read_bytes())
    table = struct.unpack_from("<I", data, 0)[0] + 28  # the only parameter's, behind root table and vector
    assert struct.unpack_from("<i", data, table + 12)[0] == 3
    struct.pack_into("<i", data, table + 12, 2)  # uint8, as Olive packs them
    file.write_bytes(data)
    assert refusal(folder) == (
        f"{FILE}: not a valid .onnx_adapter file: tensor '{Q}.lora_A.quant.weight' has data type 2; only 1 (float32), "
        f"3 (int8) and 10 (float16) are allowed\n{FLOATS}"
    )


def test_a_factor_as_wide_as_another_base(tmp_path: Path) -> None:
    """Read as a graph has them the factors are of 2 features at rank 6; only as in torch they fit."""
    folder = write(tmp_path / "mine", {f"{Q}.lora_A": QA.T.copy(), f"{Q}.lora_B": QB.T.copy()})
    site = resolved(folder).sites[Q]
    np.testing.assert_array_equal(site.a, QA)
    np.testing.assert_array_equal(site.b, QB)
    (adapter,) = read_adapters(folder)
    other = {Q: replace(MODULES[Q], weight_shape=(8, 8), in_features=8, out_features=8)}
    with pytest.raises(AdapterError, match=r"has shape .*, but module"):
        resolve(fit_to_base(adapter, other, None), other)
