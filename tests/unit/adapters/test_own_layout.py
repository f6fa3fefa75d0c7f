"""What is read from folders in edgeadapt's own layout, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeadapt.adapters import describe, read_adapters
from edgeadapt.adapters.adapter import TargetModule
from edgeadapt.adapters.resolve import resolve
from edgeadapt.errors import AdapterError

SITE = "encoder.layers.0.fc2"
SEE = "see docs/formats/adapter-folder.md for what the kind takes"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    mine = tmp_path / "mine"
    mine.mkdir()
    shapes = {"down.weight": (2, 5), "down.bias": (2,), "up.weight": (5, 2), "up.bias": (5,)}
    tensors = {f"{SITE}.{part}": generator.standard_normal(shape).astype(np.float32) for part, shape in shapes.items()}
    save_file(tensors, mine / "adapter.safetensors")
    config = {"edgeadapt_type": "linear_adapter", "modules": [SITE], "activation": "gelu", "scaling": 2.0}
    (mine / "adapter_config.json").write_text(json.dumps(config))
    return mine


def edit(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change(folder: Path, put: dict[str, np.ndarray], drop: tuple[str, ...] = ()) -> None:
    tensors = load_file(folder / "adapter.safetensors") | put
    save_file({k: v for k, v in tensors.items() if k not in drop}, folder / "adapter.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapters(folder)
    return f"{caught.value.message}\n{caught.value.hint}".replace(f"{folder}/", "")


def module(path: str = SITE, kind: Any = "linear", size: int = 5) -> dict[str, TargetModule]:
    return {path: TargetModule(path, kind, "Linear", (size, 7), 7, size, True, "0" * 64)}


def test_it_is_the_bottleneck_that_its_parts_say(folder: Path) -> None:
    (adapter,) = read_adapters(folder)
    assert (adapter.kind, adapter.layout, adapter.name) == ("linear_adapter", "edgeadapt", "mine")
    saved = load_file(folder / "adapter.safetensors")
    (found,) = resolve(adapter, module()).bottlenecks
    assert (found.site, found.reads, found.activation, found.normalized) == (SITE, "output", "gelu", False)
    np.testing.assert_array_equal(found.down, saved[f"{SITE}.down.weight"].T)
    np.testing.assert_array_equal(found.up, 2 * saved[f"{SITE}.up.weight"].T)
    np.testing.assert_array_equal(found.up_bias, 2 * saved[f"{SITE}.up.bias"])
    facts = describe(adapter)
    assert facts["width"] == {"min": 2, "max": 2}
    assert facts["merge"]["exact"] is False


def test_a_norm_of_its_own_is_folded_in(folder: Path) -> None:
    gain, offset = np.arange(1, 6, dtype=np.float32), np.full(5, 0.5, np.float32)
    change(folder, {f"{SITE}.norm.weight": gain, f"{SITE}.norm.bias": offset})
    edit(folder, norm=True)
    (found,) = resolve(read_adapters(folder)[0], module()).bottlenecks
    saved = load_file(folder / "adapter.safetensors")
    n = np.linspace(-1, 1, 5, dtype=np.float32)
    expected = (n * gain + offset) @ saved[f"{SITE}.down.weight"].T + saved[f"{SITE}.down.bias"]
    assert found.normalized
    np.testing.assert_allclose(n @ found.down + found.down_bias, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"edgeadapt_type": "strange"}, "edgeadapt_type 'strange' is not supported\n"),
        ({"dropout": 0.1}, f"dropout is 0.1, a setting that linear_adapter does not have\n{SEE}"),
        ({"modules": []}, f"modules is [], not a list of module paths\n{SEE}"),
        ({"modules": [SITE, SITE]}, f"modules names a module twice: ['{SITE}', '{SITE}']\n{SEE}"),
        ({"scaling": 0}, f"scaling is 0, must be a number other than 0\n{SEE}"),
        ({"scaling": float("nan")}, f"scaling is nan, must be a number other than 0\n{SEE}"),
        ({"norm": 1}, f"norm is 1, must be true or false\n{SEE}"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3, not text or null\n"),
    ],
)
def test_a_config_that_means_nothing_is_refused(values: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder, **values)
    assert refusal(folder).startswith(f"adapter_config.json: {message}")


@pytest.mark.parametrize(
    ("put", "drop", "message"),
    [
        ({}, ("up.weight",), f"tensor '{SITE}.up.weight' is missing in"),
        ({"gate": (5,)}, (), f"tensor '{SITE}.gate' is no part of a linear_adapter at its modules in"),
        ({"up.weight": (5,)}, (), f"tensor '{SITE}.up.weight' has the shape [5], not 2 axes in"),
        ({"up.weight": (0, 2)}, (), f"tensor '{SITE}.up.weight' is F32[0, 2], not numbers in"),
    ],
)
def test_tensors_are_complete_and_all_used(
    put: dict[str, tuple[int, ...]], drop: tuple[str, ...], message: str, folder: Path
) -> None:
    change(
        folder,
        {f"{SITE}.{part}": np.ones(shape, np.float32) for part, shape in put.items()},
        tuple(f"{SITE}.{part}" for part in drop),
    )
    assert refusal(folder) == f"{message} adapter.safetensors\nsave the adapter again where it was trained"


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (module("other"), f"the adapter names module '{SITE}', which base 'tiny' does not have"),
        (
            module(kind="conv2d"),
            f"module '{SITE}' is of type conv2d, and a linear_adapter goes beside linear or conv1d or norm",
        ),
        (
            module(size=6),
            f"tensor '{SITE}.down.weight' has the shape [2, 5], the base's module and the other parts need [2, 6]",
        ),
    ],
)
def test_another_base_is_refused(modules: dict[str, TargetModule], message: str, folder: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        resolve(read_adapters(folder)[0], modules, base_name="tiny")
    assert caught.value.message == f"adapter 'mine': {message}"
