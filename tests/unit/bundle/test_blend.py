from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate
from edgeadapt.bundle.bind import bind
from edgeadapt.bundle.blend import blend
from edgeadapt.errors import BundleError

SHAPES = "'classifier.weight' has different shapes in what is blended: [2, 4] and [3, 4]; such heads cannot be blended"
WEIGHTS = st.floats(-2, 2).map(lambda value: round(value, 3))


def site_output(slot, inputs, x, base):
    """Compute what the graph computes at one slot, in float64."""
    get = {term: inputs[name].astype(np.float64) for term, name in slot.inputs.items() if name in inputs}
    axis = (slice(None), None, None) if slot.type == "conv2d" else (slice(None),)
    y = base(x * get["input_gain"]) if "input_gain" in get else base(x)
    if "a" in get:
        if slot.type == "embedding":
            y = y + get["a"][x] @ get["b"]
        elif slot.type == "conv2d":  # one output position of a 3x3 kernel: x is the patch [in, 3, 3], y [out, 1, 1]
            middle = np.tensordot(get["a"], x, 3)
            y = y + np.einsum("orhw,r->ohw", get["b"], middle)
        else:
            y = y + x @ get["a"] @ get["b"]
    return y * get.get("gain", np.float64(1.0))[axis if "gain" in get else ()] + (get.get("offset", 0.0))


def sample(slot, random):
    """Return an input of the module, and the module."""
    if slot.type == "embedding":
        rows = random.normal(size=(7, 4))
        return random.integers(0, slot.in_features, 7), lambda _: rows
    if slot.type == "conv2d":
        channels = random.normal(size=(8, 1, 1))
        return random.normal(size=(2, 3, 3)), lambda _: channels
    weight, bias = random.normal(size=(slot.in_features, slot.out_features)), random.normal(size=slot.out_features)
    return random.normal(size=(7, slot.in_features)), lambda x: x @ weight + bias


@given(st.lists(WEIGHTS, min_size=1, max_size=4), st.integers(0, 100))
@settings(max_examples=50)
def test_a_blend_is_the_weighted_sum_of_differences(manifest, make_adapter, weights, seed):
    random = np.random.default_rng(seed)
    parts = [(weight, bind(make_adapter(seed=seed + i, rank=i + 1), manifest)) for i, weight in enumerate(weights)]
    defaults = {name: random.normal(size=parts[0][1][name].shape) for name in ("classifier.weight", "classifier.bias")}
    blended = blend(parts, manifest, defaults)
    for slot in manifest.slots:
        x, base = sample(slot, random)
        expected = base(x) + sum(weight * (site_output(slot, inputs, x, base) - base(x)) for weight, inputs in parts)
        measured = site_output(slot, blended, x, base)
        gain = blended.get(slot.inputs.get("gain", ""), np.ones(1))
        scale = np.abs(expected).max() / min(1, np.abs(gain).min())
        np.testing.assert_allclose(measured, expected, atol=2e-5 * scale, err_msg=slot.site)
    for name, default in defaults.items():
        expected = default + sum(weight * (inputs[name] - default) for weight, inputs in parts)
        np.testing.assert_allclose(blended.get(name, default), expected, atol=1e-5)


def test_one_adapter_of_weight_1_is_itself(manifest, make_adapter):
    inputs = bind(make_adapter(), manifest)
    for parts in ([(1, inputs)], [(1.0, inputs), (0.0, bind(make_adapter(seed=1), manifest))]):
        blended = blend(parts, manifest)
        assert list(blended) == list(inputs)
        assert all(blended[name].tobytes() == value.tobytes() for name, value in inputs.items())


def test_weights_of_0_are_the_base(manifest, make_adapter):
    assert blend([(0.0, bind(make_adapter(), manifest))], manifest) == {}


def test_ranks_add_up_and_gains_appear_only_where_there_are_some(manifest, make_adapter):
    plain = ResolvedAdapter("p", "lora", {"layer.q": SiteUpdate(np.ones((4, 1)), np.ones((1, 6)))}, {})
    blended = blend([(0.5, bind(plain, manifest)), (0.25, bind(plain, manifest))], manifest)
    assert {name: value.shape for name, value in blended.items()} == {
        "layer.q.lora_A": (4, 2),
        "layer.q.lora_B": (2, 6),
    }
    assert blended["layer.q.lora_B"][:, 0].tolist() == [0.5, 0.25]
    full = blend(
        [(0.5, bind(plain, manifest)), (0.5, bind(make_adapter(), manifest))],
        manifest,
        {"classifier.weight": np.zeros((2, 4)), "classifier.bias": np.zeros(2)},
    )
    assert full["layer.q.lora_A"].shape == (4, 4)
    assert full["layer.q.gain"].dtype == np.float32
    assert full["layer.conv.lora_A"].shape == (3, 2, 3, 3)


def test_heads_with_weights_that_add_up_to_1_need_no_default(manifest, make_adapter):
    parts = [(w, bind(make_adapter(seed=i, labels=5), manifest)) for i, w in enumerate((0.7, 0.2, 0.1))]
    blended = blend(parts, manifest)
    expected = sum(weight * inputs["classifier.weight"] for weight, inputs in parts)
    np.testing.assert_allclose(blended["classifier.weight"], expected, atol=1e-6)


def head(manifest, labels):
    replaced = {"classifier.weight": np.ones((labels, 4)), "classifier.bias": np.ones(labels)}
    return bind(ResolvedAdapter("h", "lora", {}, replaced), manifest)


def gained(manifest, gain):
    update = SiteUpdate(np.ones((4, 1)), np.ones((1, 6)), gain=np.full(6, gain))
    return bind(ResolvedAdapter("g", "lora", {"layer.q": update}, {}), manifest)


BOTH = (
    "one adapter of the blend scales the inputs of module 'layer.q' (input_gain) and one, the same or another, its "
    "outputs (gain): their weighted sum is neither"
)


@pytest.mark.parametrize("weights", [(0.5,), (0.5, 0.5), (1.0, 1.0)])
def test_gains_of_inputs_and_of_outputs_do_not_add(manifest, weights):
    """Whether they are of one adapter or of two; one of weight 1 is itself."""
    slot = manifest.slots[0]
    names = {"gain": "layer.q.gain", "input_gain": "layer.q.input_gain"}
    manifest = dataclasses.replace(manifest, slots=(dataclasses.replace(slot, inputs=slot.inputs | names),))
    gains = [{names["gain"]: np.full(6, 2.0)}, {names["input_gain"]: np.full(4, 3.0)}]
    parts = gains if len(weights) == 2 else [gains[0] | gains[1]]
    with pytest.raises(BundleError) as caught:
        blend(list(zip(weights, parts, strict=True)), manifest)
    assert (caught.value.message, caught.value.hint) == (BOTH, "use one of them alone, with weight 1")
    assert blend([(1.0, gains[0] | gains[1]), (0.0, gains[0])], manifest).keys() == set(names.values())
    alone = blend([(0.5, gains[1]), (0.25, gains[1])], manifest)
    np.testing.assert_array_equal(alone[names["input_gain"]], np.full(4, 2.5, np.float32))


@pytest.mark.parametrize(
    ("parts", "defaults", "message"),
    [
        (lambda _: [], None, "a blend needs at least one adapter"),
        (lambda m: [(float("nan"), head(m, 2))], None, "blend weight nan is not a finite number"),
        (lambda _: [(1.0, {"input_ids": np.ones(1)})], None, "'input_ids' is not an adapter input of bundle 'toy'"),
        (
            lambda m: [(0.5, head(m, 2)), (0.5, head(m, 3))],
            None,
            SHAPES,
        ),
        (
            lambda m: [(0.5, head(m, 3))],
            {"classifier.weight": np.ones((2, 4))},
            SHAPES,
        ),
        (
            lambda m: [(0.5, head(m, 2))],
            None,
            (
                "'classifier.weight' is replaced with weights that do not add up to 1, and the base's own value is "
                "not at hand"
            ),
        ),
        (
            lambda m: [(0.5, gained(m, 0)), (0.5, gained(m, 0))],
            None,
            "the blended gain of module 'layer.q' is exactly 0 at channel 0, so the blend has no low-rank form there",
        ),
        (lambda m: [(1e39, gained(m, 2.0))], None, "the blend overflows at 'layer.q.gain'"),
        (
            lambda _: [(0.5, {"layer.q.lora_A": np.ones((4, 1))})],
            None,
            "only one of 'layer.q.lora_A' and 'layer.q.lora_B' is given",
        ),
    ],
)
def test_refusals(manifest, parts, defaults, message):
    with pytest.raises(BundleError) as caught:
        blend(parts(manifest), manifest, defaults)
    assert caught.value.message == message
