"""Which layers are worth 8 bits."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from edgeadapt.export.graph import Graph
from edgeadapt.export.importance import collect_importance
from edgeadapt.merging.load import base_from_module
from edgeadapt.quantize.mixed import FITTED, rank_groups
from edgeadapt.quantize.quantize import quantize


@pytest.fixture
def branching(builder: Any) -> Graph:
    """Two layers that read one input, and one that reads theirs."""
    random = np.random.default_rng(0)
    x = builder.input("x", ["batch", 64])
    one, two = (
        builder.site(name, x, builder.node("MatMul", [x, builder.constant(name, _normal(random, 64, 96))]))
        for name in ("query", "key")
    )
    total = builder.node("Add", [one, two])
    last = builder.node("MatMul", [total, builder.constant("last", _normal(random, 96, 64))])
    builder.output("y", builder.node("Neg", [builder.site("out", total, last)]))
    return builder.done()


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def test_layers_with_one_input_share_their_bits_and_what_matters_comes_first(branching: Graph) -> None:
    ones = {"query": np.ones(96, np.float32), "key": np.ones(96, np.float32), "out": np.ones(64, np.float32)}
    mix = rank_groups(branching, ones)
    assert [group.paths for group in mix.groups] == [("query", "key"), ("out",)]

    mix = rank_groups(branching, {**ones, "out": np.full(64, 100, np.float32)})
    assert [group.paths for group in mix.groups] == [("out",), ("query", "key")]
    assert mix.raised(1) == {"out"}
    assert mix.loss(0) == pytest.approx(mix.groups[0].loss + mix.groups[1].loss)


def test_moments_make_their_directions_count(branching: Graph) -> None:
    ones = {"query": np.ones(96, np.float32), "key": np.ones(96, np.float32), "out": np.ones(64, np.float32)}
    flat = rank_groups(branching, ones)
    # Inputs of length 1 that are alike in every direction: what is supposed without moments, and the mixed-in share.
    even = rank_groups(branching, ones, moments={"out": np.eye(96, dtype=np.float32) / 96})
    assert even.groups[-1].paths == ("out",)
    assert even.groups[-1].loss == pytest.approx((1 + FITTED) * flat.groups[-1].loss, rel=1e-4)
    loud = np.eye(96, dtype=np.float32) / 96
    loud[0, 0] = 50
    assert rank_groups(branching, ones, moments={"out": loud}).loss(0) > even.loss(0)


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("keep", [{}, {"plain": "fp16", "ragged": "int8"}])
def test_the_bytes_are_those_of_the_file(tiny: Graph, block_size: int, keep: dict[str, str]) -> None:
    mix = rank_groups(tiny, {}, keep=keep, block_size=block_size)
    for count in range(len(mix.groups) + 1):
        raised = mix.raised(count)
        _, record = quantize(tiny, "int4", keep=keep, block_size=block_size, raised=raised)
        assert record["bytes_after"] == mix.bytes(count)
        assert [entry["path"] for entry in record["kept"] if entry["reason"] == "raised to 8 bits"] == [
            path for path in ("plain", "gemm", "turned", "ragged") if path in raised
        ]
    assert not any(path in mix.raised(len(mix.groups)) for path in keep)


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(4, 3)
        self.two = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def test_importance_is_of_the_gradients_at_the_outputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    base = base_from_module(_Net(), name="net", example_inputs={"x": x}, dynamic_axes={"x": {0: "batch"}})

    base.module.requires_grad_(True)
    found = collect_importance(base, [{"x": x}])

    with torch.no_grad():
        hidden = base.module.one(x)
    # Random signs at the outputs: g^2 is 1 at the last layer's, (sum of +-w)^2 on average sum of w^2 before it.
    np.testing.assert_allclose(found["two"], np.full(2, hidden.square().sum(1).mean()), rtol=1e-5)
    weight = base.module.two.weight.detach().square().sum(0) * x.square().sum(1).mean()
    np.testing.assert_allclose(found["one"], weight, rtol=0.3)
    assert all(parameter.requires_grad for parameter in base.module.parameters())
    again = collect_importance(base, [{"x": x}])
    assert all(np.array_equal(found[path], again[path]) for path in found)


def test_heads_of_other_sizes_are_left_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    base = base_from_module(_Net(), name="net", example_inputs={"x": x}, dynamic_axes={"x": {0: "batch"}})
    other = copy.deepcopy(base.module)
    other.two = torch.nn.Linear(3, 5)

    found = collect_importance(base, [{"x": x}], adapted=[(other, [{"x": x}])])

    assert {path: len(values) for path, values in found.items()} == {"one": 3, "two": 2}
    plain = collect_importance(base, [{"x": x}])
    np.testing.assert_allclose(found["two"], plain["two"] / 2, rtol=1e-6)


class _Classifier(_Net):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": super().forward(x)}


def test_importance_of_logits_is_the_fisher_information() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 4)
    base = base_from_module(_Classifier(), name="net", example_inputs={"x": x}, dynamic_axes={"x": {0: "batch"}})

    found = collect_importance(base, [{"x": x}])

    with torch.no_grad():
        hidden = base.module.one(x)
        p = base.module.two(hidden).softmax(-1)
        expected = (p * (1 - p) * hidden.square().sum(1, keepdim=True)).mean(0)
    np.testing.assert_allclose(found["two"], expected, rtol=0.1)
