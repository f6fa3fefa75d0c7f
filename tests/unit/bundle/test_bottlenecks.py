"""Bottlenecks bound, read back and blended; wrong ones refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgeadapt.adapters.adapter import Bottleneck, ResolvedAdapter, SiteUpdate
from edgeadapt.bundle.bind import bind, check_inputs, unbind
from edgeadapt.bundle.blend import blend
from edgeadapt.bundle.rules import check_manifest
from edgeadapt.errors import BundleError
from edgeadapt.slots import BOTTLENECK_TERMS, BottleneckKind, BottleneckSlot

SITE = "layer.q"


def slot(reads="output", activation="relu", *, normalized=False, stage=0, fused=False, **changes):
    kind = BottleneckKind(reads, activation, normalized, stage, fused)
    inputs = {term: f"{kind.prefix(SITE)}.{term}" for term in kind.terms}
    found = BottleneckSlot(SITE, ("model",), reads, activation, normalized, 6, inputs, stage, fused)
    return dataclasses.replace(found, **changes)


def bottleneck(width, seed=0, reads="output", activation="relu"):
    draw = np.random.default_rng(seed).standard_normal
    shapes = ((6, width), (width,), (width, 6), (6,))
    return Bottleneck(SITE, reads, activation, False, *(draw(shape).astype(np.float32) for shape in shapes))


def adapter(*bottlenecks, sites=None):
    return ResolvedAdapter("x", "bottleneck", sites or {}, {}, bottlenecks=bottlenecks)


def fusion(parts, width):
    draw = np.random.default_rng(parts).standard_normal
    narrow = ((parts, 6, width), (parts, 1, width), (parts, width, 6), (parts, 1, 6))
    keys = (draw(shape).astype(np.float32) for shape in ((parts, width, 7), (parts, 1, 7)))
    arrays = (draw(shape).astype(np.float32) for shape in narrow)
    return Bottleneck(SITE, "output", "relu", False, *arrays, 0, *keys)


@pytest.fixture
def beside(manifest):
    return dataclasses.replace(manifest, bottlenecks=(slot(), slot("residual"), slot("output", "tanh")))


def value(inputs, v, prefix=f"{SITE}.bottleneck.output.relu"):
    down, down_bias, up, up_bias = (inputs[f"{prefix}.{term}"] for term in BOTTLENECK_TERMS)
    return np.maximum(v @ down + down_bias, 0) @ up + up_bias


def test_there_and_back(beside):
    given = adapter(bottleneck(3), bottleneck(2, 1, "residual"))
    bound = bind(given, beside)
    assert {name: array.shape for name, array in bound.items()} == {
        f"{SITE}.bottleneck.{reads}.relu.{term}": shape
        for reads, width in (("output", 3), ("residual", 2))
        for term, shape in zip(BOTTLENECK_TERMS, ((6, width), (width,), (width, 6), (6,)), strict=True)
    }
    back = unbind("x", bound, beside)
    assert [(item.reads, item.up.shape) for item in back.bottlenecks] == [("output", (3, 6)), ("residual", (2, 6))]
    assert back.parameter_count == given.parameter_count == 6 * 3 * 2 + 3 + 6 + 6 * 2 * 2 + 2 + 6
    assert all((check_inputs("x", bound, beside)[name] == array).all() for name, array in bound.items())


def test_one_behind_another_and_a_fusion(manifest):
    """They come back as they went, and are blended with nothing that has a bottleneck at their module."""
    slots = (slot(), slot(stage=1), slot(fused=True))
    manifest = dataclasses.replace(manifest, bottlenecks=slots)
    assert [item.inputs["up"] for item in slots] == [
        f"{SITE}.bottleneck.output.relu{more}.up" for more in ("", ".stage1", ".fused")
    ]
    given = adapter(bottleneck(3), dataclasses.replace(bottleneck(2, 1), stage=1), fusion(2, 4))
    bound = bind(given, manifest)
    assert len(bound) == 4 + 4 + 6
    back = unbind("x", bound, manifest)
    for one, other in zip(given.bottlenecks, back.bottlenecks, strict=True):
        assert one.slot_kind == other.slot_kind
        assert all((a == b).all() for a, b in zip(one.arrays, other.arrays, strict=True))
    halved = blend([(0.5, bound)], manifest)
    for item in slots:
        np.testing.assert_array_equal(halved[item.inputs["up"]], bound[item.inputs["up"]] / 2)
        np.testing.assert_array_equal(halved[item.inputs["down"]], bound[item.inputs["down"]])
    keys = slots[2].inputs["key"]
    np.testing.assert_array_equal(halved[keys], bound[keys])
    other = bind(adapter(bottleneck(2)), manifest)
    for part, what in (
        (dataclasses.replace(bottleneck(2, 1), stage=1), "one bottleneck behind another"),
        (fusion(2, 4), "an attention over several bottlenecks"),
    ):
        with pytest.raises(BundleError) as caught:
            blend([(0.5, bind(adapter(part), manifest)), (0.5, other)], manifest)
        assert caught.value.message == (
            f"in this blend one adapter has {what} at module 'layer.q', and another has a bottleneck there too; such a "
            "blend has no form that the graph computes"
        )
    wrong = dataclasses.replace(fusion(2, 4), key=np.ones((2, 4, 6), np.float32))
    with pytest.raises(BundleError) as caught:
        bind(adapter(wrong), manifest)
    assert caught.value.message == (
        "adapter 'x': 'layer.q.bottleneck.output.relu.fused.key' has the shape [2, 4, 6], this base needs [2, 4, 7]"
    )


def test_a_blend_is_the_weighted_sum(beside):
    v = np.random.default_rng(5).standard_normal((4, 6)).astype(np.float32)
    one, two = (bind(adapter(bottleneck(width, seed)), beside) for width, seed in ((3, 0), (2, 1)))
    found = value(blend([(0.7, one), (-0.4, two)], beside), v)
    np.testing.assert_allclose(found, 0.7 * value(one, v) - 0.4 * value(two, v), rtol=1e-5, atol=1e-5)
    with_term = bind(adapter(sites={SITE: SiteUpdate(offset=np.ones(6, np.float32))}), beside)
    with pytest.raises(BundleError) as caught:
        blend([(0.5, one), (0.5, with_term)], beside)
    assert caught.value.message == (
        "in this blend one adapter changes module 'layer.q' and another has a bottleneck that reads it; such a blend "
        "has no form that the graph computes"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            adapter(bottleneck(2, activation="gelu")),
            (
                "adapter 'x' has a bottleneck (gelu, reads output) beside module 'layer.q', for which this bundle has "
                "no slot (it has (relu, reads output), (relu, reads residual), (tanh, reads output))"
            ),
        ),
        (
            adapter(dataclasses.replace(bottleneck(2), down=np.ones((5, 2), np.float32))),
            "adapter 'x': 'layer.q.bottleneck.output.relu.down' has the shape [5, 2], this base needs [6, 2]",
        ),
        (
            adapter(bottleneck(2), bottleneck(3)),
            "adapter 'x' has two bottlenecks (relu, reads output) at 'layer.q'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, message, beside):
    with pytest.raises(BundleError) as caught:
        bind(given, beside)
    assert caught.value.message == message


def test_part_of_a_bottleneck_is_refused(beside):
    bound = bind(adapter(bottleneck(2)), beside)
    del bound[f"{SITE}.bottleneck.output.relu.up_bias"]
    with pytest.raises(BundleError) as caught:
        unbind("x", bound, beside)
    assert caught.value.message == (
        "adapter 'x' has no 'layer.q.bottleneck.output.relu.up_bias', but 'layer.q.bottleneck.output.relu.down': part "
        "of a bottleneck is missing"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (slot(site="nowhere"), "bottleneck slot 'nowhere' is not a module of the base"),
        (slot(features=5), "bottleneck slot 'layer.q' has 5 features, its module 6"),
        (
            slot(reads="mind"),
            "reads of bottleneck slot 'layer.q' is 'mind', must be one of output, residual, sum, norm",
        ),
        (slot(stage=-1), "bottleneck slot 'layer.q' has the stage -1, must be 0 or more"),
        (
            slot(inputs={"down": "d"}),
            "bottleneck slot 'layer.q' has the terms ['down'], must have ['down', 'down_bias', 'up', 'up_bias']",
        ),
    ],
)
def test_rules_of_the_manifest(wrong, message, make_bundle):
    whole = make_bundle().manifest
    with pytest.raises(BundleError) as caught:
        check_manifest(dataclasses.replace(whole, bottlenecks=(wrong,)), "m")
    assert caught.value.message == f"m: {message}"
