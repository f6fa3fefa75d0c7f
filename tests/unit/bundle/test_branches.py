"""Branches between arrays and graph inputs: what is bound, read back, refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from edgeadapt.adapters.adapter import Branch, ResolvedAdapter
from edgeadapt.bundle.bind import bind, unbind
from edgeadapt.bundle.blend import blend
from edgeadapt.bundle.manifest import Manifest
from edgeadapt.bundle.rules import check_manifest
from edgeadapt.errors import BundleError
from edgeadapt.slots import BranchSlot

SHAPES = {"keys": ("rows", 4), "values": ("rows", 3)}


KEYS = np.ones((2, 4), np.float32)


def slot(**settings: str | int) -> BranchSlot:
    inputs = {term: f"layer.q.cache{settings or ''}.{term}" for term in SHAPES}
    return BranchSlot("layer.q", ("model",), "cache", settings, inputs, SHAPES)


def adapter(*branches: Branch) -> ResolvedAdapter:
    return ResolvedAdapter("x", "tip_adapter", {}, {}, branches=branches)


def branch(rows: int = 2, values: tuple[int, ...] | None = None, **settings: str | int) -> Branch:
    arrays = {"keys": np.ones((rows, 4), np.float32), "values": np.ones(values or (rows, 3), np.float32)}
    return Branch("layer.q", "cache", settings, arrays)


@pytest.fixture
def whole(manifest: Manifest) -> Manifest:
    return dataclasses.replace(manifest, branches=(slot(), slot(kernel=3)))


def test_bound_and_read_back(whole: Manifest) -> None:
    inputs = bind(adapter(branch(), branch(5, kernel=3)), whole)
    assert {name: value.shape for name, value in inputs.items()} == {
        **{f"layer.q.cache.{term}": shape for term, shape in (("keys", (2, 4)), ("values", (2, 3)))},
        **{f"layer.q.cache{{'kernel': 3}}.{term}": shape for term, shape in (("keys", (5, 4)), ("values", (5, 3)))},
    }
    back = unbind("x", inputs, whole)
    assert [(item.form, dict(item.settings), item.tensors["keys"].shape) for item in back.branches] == [
        ("cache", {}, (2, 4)),
        ("cache", {"kernel": 3}, (5, 4)),
    ]


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ([branch(kernel=5)], "has a network (cache, kernel 5) beside {no_slot} (it has (cache), (cache, kernel 3))"),
        ([branch(), branch()], "has two networks (cache) at 'layer.q'"),
        (
            [Branch("layer.q", "cache", {}, {"keys": KEYS})],
            "has ['keys'] beside {terms} ('values' is too much or missing)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(branches: list[Branch], message: str, whole: Manifest) -> None:
    with pytest.raises(BundleError) as caught:
        bind(adapter(*branches), whole)
    no_slot = "module 'layer.q', for which this bundle has no slot"
    terms = "module 'layer.q', this bundle takes ['keys', 'values']"
    assert caught.value.message == f"adapter 'x' {message.format(no_slot=no_slot, terms=terms)}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (branch(values=(3, 3)), "'layer.q.cache.values' has the shape [3, 3], this base needs [2, 3]"),
        (branch(0), "'layer.q.cache.keys' has the shape [0, 4], this base needs ['rows', 4]"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(wrong: Branch, message: str, whole: Manifest) -> None:
    with pytest.raises(BundleError) as caught:
        bind(adapter(wrong), whole)
    assert caught.value.message == f"adapter 'x': {message}"


def test_a_blend_with_a_branch_is_refused(whole: Manifest) -> None:
    inputs = bind(adapter(branch()), whole)
    assert blend([(1.0, inputs)], whole).keys() == inputs.keys()
    with pytest.raises(BundleError) as caught:
        blend([(0.5, inputs)], whole)
    assert caught.value.message == (
        "an adapter of the blend has a network of its own beside module 'layer.q', which has no weighted form"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "nowhere"}, "m: branch slot 'nowhere' is not a module of the base"),
        ({"graphs": ("decoder",)}, "m: slot 'layer.q' names graph 'decoder', which has no slots"),
        ({"shapes": {"keys": (0,)}}, "m: branch slot 'layer.q' has inputs ['keys', 'values'] and shapes for ['keys']"),
    ],
)
def test_a_manifest_with_a_wrong_slot_is_refused(change: dict[str, object], message: str, make_bundle: Any) -> None:
    whole, wrong = make_bundle().manifest, dataclasses.replace(slot(), **change)
    with pytest.raises(BundleError) as caught:
        check_manifest(dataclasses.replace(whole, branches=(wrong,)), "m")
    assert caught.value.message == message
