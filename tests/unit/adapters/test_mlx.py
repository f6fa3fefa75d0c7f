"""What is read from MLX-LM's folders, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeadapt.adapters import describe, read_adapters
from edgeadapt.errors import AdapterError

Q, V = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
AGAIN = "copy the folder again from where the adapter was trained"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    mine = tmp_path / "mine"
    mine.mkdir()
    shapes = {f"{module}.{part}": s for module in (Q, V) for part, s in (("lora_a", (6, 2)), ("lora_b", (2, 5)))}
    tensors = {key: generator.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    save_file(tensors, mine / "adapters.safetensors")
    parameters = {"rank": 2, "scale": 10.0, "dropout": 0.0, "alpha": 16}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, "model": "some/base-4bit"}
    (mine / "adapter_config.json").write_text(json.dumps(config))
    return mine


def edit(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for key, value in values.items():
        if key in ("rank", "scale", "keys", "strange"):
            config["lora_parameters"][key] = value
        else:
            config[key] = value
    file.write_text(json.dumps(config))


def change(folder: Path, put: dict[str, np.ndarray], drop: tuple[str, ...] = ()) -> None:
    tensors = load_file(folder / "adapters.safetensors") | put
    save_file({k: v for k, v in tensors.items() if k not in drop}, folder / "adapters.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapters(folder)
    return f"{caught.value.message}\n{caught.value.hint}".replace(f"{folder}/", "")


def test_it_is_the_lora_that_its_factors_and_scale_say(folder: Path) -> None:
    (adapter,) = read_adapters(folder)
    saved = load_file(folder / "adapters.safetensors")
    assert (adapter.kind, adapter.layout, adapter.name) == ("lora", "mlx", "mine")
    assert adapter.config["lora_alpha"] / adapter.config["r"] == 10.0
    assert set(adapter.tensors) == {f"{m}.lora_{x}.weight" for m in (Q, V) for x in "AB"}
    np.testing.assert_array_equal(adapter.tensors[f"{Q}.lora_A.weight"].read(), saved[f"{Q}.lora_a"].T)
    np.testing.assert_array_equal(adapter.tensors[f"{Q}.lora_B.weight"].read(), saved[f"{Q}.lora_b"].T)
    assert adapter.warnings == (
        "no base_fingerprint.json: only the base's module names and shapes can be checked",
        "it was trained on 'some/base-4bit', by its name a quantized base: this one's weights may differ",
    )
    assert describe(adapter)["rank"] == {"min": 2, "max": 2, "modules": {"2": 2}}


def test_a_scale_is_no_alpha(folder: Path) -> None:
    edit(folder, scale=0.3)
    (adapter,) = read_adapters(folder)
    assert adapter.config["lora_alpha"] / adapter.config["r"] == pytest.approx(0.3, rel=1e-15)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"fine_tune_type": "full"},
            (
                "adapter_config.json: fine_tune_type is 'full': only 'lora' and 'dora' are adapters\n"
                "give a model that was trained whole as --base"
            ),
        ),
        ({"lora_parameters": None}, f"adapter_config.json: lora_parameters is None, not a table\n{AGAIN}"),
        (
            {"strange": 3},
            (
                "adapter_config.json: lora_parameters has an unknown key 'strange', set to 3\n"
                "update edgeadapt, or remove the key if it has no effect after training"
            ),
        ),
        (
            {"scale": "10"},
            f"adapter_config.json: lora_parameters.scale is '10', not a number above 0\n{AGAIN}",
        ),
        (
            {"rank": 4},
            (
                f"tensor '{Q}.lora_a' in adapters.safetensors has rank 2, but lora_parameters.rank is 4\n"
                "copy the adapter_config.json that was saved with these tensors"
            ),
        ),
        ({"keys": []}, f"adapter_config.json: lora_parameters.keys is [], not a list of names\n{AGAIN}"),
        ({"num_layers": None}, f"adapter_config.json: num_layers is None, not a whole number\n{AGAIN}"),
        (
            {"num_layers": 2},
            f"num_layers is 2, the last so many, but adapters.safetensors has layers 1\n{AGAIN}",
        ),
    ],
)
def test_configs_that_say_something_else(folder: Path, values: dict[str, Any], words: str) -> None:
    edit(folder, **values)
    assert refusal(folder) == words


ROW = np.ones((2, 5), np.float32)
STRANGE_PART = (
    "quantized factors, experts' and modules trained whole are not read from MLX-LM; give the adapter as trained"
)


@pytest.mark.parametrize(
    ("put", "drop", "words"),
    [
        (
            {},
            (f"{Q}.lora_b",),
            f"tensor '{Q}.lora_b' is missing in adapters.safetensors ('{Q}.lora_a' is there)\n{AGAIN}",
        ),
        (
            {f"{Q}.m": ROW[0]},
            (),
            (
                f"tensor '{Q}.m' in adapters.safetensors is no part of a lora adapter, which has lora_a, lora_b\n"
                f"{STRANGE_PART}"
            ),
        ),
        (
            {f"{Q}.lora_a_scales": ROW},
            (),
            (
                f"tensor '{Q}.lora_a_scales' in adapters.safetensors is no part of a lora adapter, which has lora_a, "
                f"lora_b\n{STRANGE_PART}"
            ),
        ),
        (
            {f"{Q}.lora_b": np.ones((3, 5), np.float32)},
            (),
            (
                f"tensors '{Q}.lora_a' and '{Q}.lora_b' in adapters.safetensors are no product of rank r: with r first "
                "and last their shapes are [2, 6] and [5, 3]\n"
                "copy the file again from where the adapter was trained; only linear layers are read in this layout"
            ),
        ),
        (
            {"model.embed_tokens.lora_a": ROW.T, "model.embed_tokens.lora_b": ROW},
            (),
            (
                "tensor 'model.embed_tokens.lora_a' in adapters.safetensors changes an embedding: where it is tied, "
                "MLX-LM changes the output layer with it, which edgeadapt does not do\n"
                "train without the embedding among lora_parameters.keys"
            ),
        ),
        (
            {"lm_head.lora_a": ROW.T, "lm_head.lora_b": ROW},
            (),
            (
                "tensor 'lm_head.lora_a' in adapters.safetensors is in no layer, and lora_parameters.keys does not "
                "name its module\ncopy the adapter_config.json that was saved with these tensors"
            ),
        ),
    ],
)
def test_tensors_without_a_use(folder: Path, put: dict[str, np.ndarray], drop: tuple[str, ...], words: str) -> None:
    change(folder, put, drop)
    assert refusal(folder) == words


def test_a_truncated_file_and_none(folder: Path) -> None:
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(AdapterError, match=r"adapters\.safetensors"):
        read_adapters(folder)
    file.unlink()
    assert refusal(folder) == f"{folder} has adapter_config.json but no adapters.safetensors\n{AGAIN}"
