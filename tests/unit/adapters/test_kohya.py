"""What is read from kohya's files, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgeadapt.adapters import read_adapters
from edgeadapt.adapters.layouts.kohya import paths_of_base
from edgeadapt.errors import AdapterError

Q, V = "lora_te_text_layers_0_q_proj", "lora_te_text_layers_0_v_proj"
MODULES = ["text.layers.0.q_proj", "text.layers.0.v_proj", "vision.layers.0.q_proj"]
AGAIN = "copy the file again from where the adapter was trained"


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


TENSORS: dict[str, np.ndarray | None] = {
    f"{Q}.lora_down.weight": numbers(2, 6),
    f"{Q}.lora_up.weight": numbers(5, 2),
    f"{Q}.alpha": np.array(3, np.float32),
    f"{V}.lora_down.weight": numbers(4, 6),
    f"{V}.lora_up.weight": numbers(5, 4),
}


def write(folder: Path, tensors: dict[str, np.ndarray | None] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in (TENSORS | (tensors or {})).items() if value is not None}
    save_file(kept, folder / "last.safetensors")
    return folder


def refusal(folder: Path, modules: list[str] | None = None) -> str:
    with pytest.raises(AdapterError) as caught:
        paths_of_base(read_adapters(folder)[0], MODULES if modules is None else modules)
    return f"{caught.value.message}\n{caught.value.hint}".replace(f"{folder}/", "")


def test_names_ranks_and_scales(tmp_path: Path) -> None:
    (flat,) = read_adapters(write(tmp_path / "mine"))
    adapter = paths_of_base(flat, MODULES)
    assert (adapter.kind, adapter.layout, adapter.name) == ("lora", "kohya", "mine")
    q, v = MODULES[:2]
    assert set(adapter.tensors) == {f"{path}.lora_{x}.weight" for path in (q, v) for x in "AB"}
    np.testing.assert_array_equal(adapter.tensors[f"{v}.lora_A.weight"].read(), TENSORS[f"{V}.lora_down.weight"])
    assert (adapter.config["r"], adapter.config["lora_alpha"]) == (2, 3.0)
    # without alpha the scale is 1
    assert set(adapter.config["rank_pattern"].values()) == {4}
    assert set(adapter.config["alpha_pattern"].values()) == {4.0}
    assert paths_of_base(adapter, []) is adapter


def test_names_that_are_no_module_or_two(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine")
    assert refusal(folder, MODULES[1:]) == (
        f"adapter 'mine': '{Q}' is no module of the base\ngive the base that the adapter was trained on"
    )
    for other in ("text.layers_0.q_proj", "te.text.layers.0.q_proj"):
        assert refusal(folder, [*MODULES, other]) == (
            f"adapter 'mine': '{Q}' can be 'text.layers.0.q_proj' or '{other}' in the base\n"
            "give the adapter as peft saved it"
        )


def test_two_networks(tmp_path: Path) -> None:
    other = "lora_unet_vision_layers_0_q_proj"
    more = {f"{other}.lora_down.weight": numbers(2, 6), f"{other}.lora_up.weight": numbers(5, 2)}
    assert refusal(write(tmp_path / "mine", more)) == (
        "adapter 'mine' changes several networks: lora_te_, lora_unet_\ngive a file with the tensors of one network"
    )


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {f"{Q}.lora_up.weight": None},
            f"tensor '{Q}.lora_up.weight' is missing in last.safetensors ('{Q}.alpha' is there)\n{AGAIN}",
        ),
        (
            {f"{Q}.dora_scale": numbers(5, 1)},
            (
                f"tensor '{Q}.dora_scale' in last.safetensors is no part of a LoRA adapter, which has "
                "lora_down.weight, lora_up.weight, alpha\n"
                "DoRA, LoHa, LoKr and the others of LyCORIS are not read in this layout; convert it to peft's"
            ),
        ),
        (
            {f"{Q}.alpha": numbers(2)},
            f"tensor '{Q}.alpha' in last.safetensors is {numbers(2).tolist()!r}, not a number of 0 or more\n{AGAIN}",
        ),
        (
            {f"{Q}.lora_up.weight": numbers(5, 3)},
            (
                f"tensors '{Q}.lora_down.weight' and '{Q}.lora_up.weight' in last.safetensors are no product of rank "
                "r: with r first and last their shapes are [2, 6] and [5, 3]\n"
                "copy the file again from where the adapter was trained; only linear layers are read in this layout"
            ),
        ),
    ],
)
def test_what_is_no_plain_lora(tensors: dict[str, np.ndarray | None], words: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "mine", tensors)) == words


def test_a_truncated_file(tmp_path: Path) -> None:
    file = write(tmp_path / "mine") / "last.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "last.safetensors is truncated" in refusal(file.parent)
