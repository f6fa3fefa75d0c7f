"""Second moments of what linear modules see."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from edgeadapt.adapters.read import read_adapters
from edgeadapt.export.activations import collect_moments
from edgeadapt.merging.load import base_from_module
from edgeadapt.merging.reference import adapted_module


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(4, 3)
        self.two = torch.nn.Linear(4, 2)
        self.last = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.one(x), self.two(x)
        return self.last(one) + two


def _expected(x: torch.Tensor, gradient: torch.Tensor) -> np.ndarray:
    """Return the moments that the definition gives, position by position."""
    total = np.zeros((x.shape[1], x.shape[1]))
    matters = [float(g @ g) for g in gradient]
    scale = len(x) / sum(m * float(row @ row) for m, row in zip(matters, x, strict=True))
    for row, m in zip(x, matters, strict=True):
        total += (1 / float(row @ row) + scale * m) * np.outer(row, row)
    return total / len(x)


def test_inputs_count_by_their_length_and_by_what_depends_on_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4) * torch.tensor([[1.0], [50.0], [1.0], [2.0], [3.0]])
    base = base_from_module(_Net(), name="net", example_inputs={"x": x}, dynamic_axes={"x": {0: "batch"}})

    moments = collect_moments(base, [{"x": x}])

    # Random signs at the two outputs: every position matters the same to `last` and `two`, to `one` by the signs.
    np.testing.assert_allclose(moments["two"], _expected(x, torch.ones(5, 2)), rtol=1e-4)
    with torch.no_grad():
        hidden = base.module.one(x)
    np.testing.assert_allclose(moments["last"], _expected(hidden, torch.ones(5, 2)), rtol=1e-4)
    assert np.trace(moments["one"]) == pytest.approx(2, rel=1e-4)
    assert set(moments) == {"one", "two", "last"}
    again = collect_moments(base, [{"x": x}])
    assert all(np.array_equal(moments[path], again[path]) for path in moments)


def test_a_layer_that_nothing_depends_on_has_inputs_of_length_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    base = base_from_module(_Net(), name="net", example_inputs={"x": x}, dynamic_axes={"x": {0: "batch"}})
    with torch.no_grad():
        base.module.last.weight.zero_()

    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(collect_moments(base, [{"x": x}])["one"], unit.T @ unit / 5, rtol=1e-5, atol=1e-7)


def _adapted(base: object, tmp_path: Path) -> torch.nn.Module:
    """Return the net with a LoRA on all three layers, saved by peft and read back."""
    config = LoraConfig(r=2, target_modules=["one", "two", "last"], init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base.module), config)
    model.save_pretrained(tmp_path / "a")
    return adapted_module(base, read_adapters(tmp_path / "a")[0])


def test_moments_are_of_the_base_and_of_every_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    base = base_from_module(_Net(), name="net", example_inputs={"x": x}, dynamic_axes={"x": {0: "batch"}})
    adapted = _adapted(base, tmp_path)
    seen = []
    adapted.get_submodule("model.last").register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    adapted(x=x)
    plain = base.module.one(x).detach()

    moments = collect_moments(base, [{"x": x}], adapted=[(adapted, [{"x": x}])])

    ones = torch.ones(5, 2)
    of_base, of_adapter = _expected(plain, ones), _expected(seen[0].detach(), ones)
    np.testing.assert_allclose(moments["last"], (of_base + of_adapter) / 2, rtol=1e-4)
    only = collect_moments(base, [], adapted=[(adapted, [{"x": x}])])
    np.testing.assert_allclose(only["last"], of_adapter, rtol=1e-4)


def test_little_memory_costs_more_runs_and_gives_the_same() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    base = base_from_module(_Net(), name="net", example_inputs={"x": x}, dynamic_axes={"x": {0: "batch"}})
    at_once = dict(collect_moments(base, [{"x": x}, {"x": x}]))
    runs: list[int] = []
    base.module.register_forward_pre_hook(lambda *_: runs.append(1))
    bit_by_bit = dict(collect_moments(base, [{"x": x}, {"x": x}], bytes_at_once=1))

    for path, moment in at_once.items():
        np.testing.assert_allclose(bit_by_bit[path], moment, rtol=1e-6)
    assert len(runs) == 2 * 3  # two cases for each of three layers
