"""Adapters made into one: sums are sums, peft's formulas are peft's, and what cannot be combined is refused by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate
from edgeadapt.bundle.bind import bind, check_inputs
from edgeadapt.bundle.blend import blend
from edgeadapt.bundle.combine import METHODS, PRUNING, RANDOM, Part, combine, relative_error, settings_of
from edgeadapt.bundle.prefix import is_prefix_tensor
from edgeadapt.bundle.stored import as_stored
from edgeadapt.errors import BundleError
from edgeadapt.slots import Slot

WEIGHTS = (0.7, -0.3, 0.5)


@pytest.fixture
def parts(make_adapter, manifest):
    """Two adapters that set something of every kind."""
    return [
        Part(name, weight, bind(make_adapter(name, seed=seed, rank=rank), manifest))
        for name, weight, seed, rank in (("one", 0.7, 1, 3), ("two", 0.3, 2, 2))
    ]


@pytest.fixture
def one_slot(manifest):
    slot = Slot("layer.q", ("model",), "linear", 24, 20, {"a": "A", "b": "B"})
    return dataclasses.replace(manifest, slots=(slot,), parameters=())


@pytest.fixture
def products():
    """Three adapters of that slot, of rank 4."""
    random = np.random.default_rng(5)
    return [
        Part(str(i), weight, {"A": random.normal(size=(24, 4)), "B": random.normal(size=(4, 20))})
        for i, weight in enumerate(WEIGHTS)
    ]


def plain(manifest, make_adapter, **settings):
    """Return an adapter that sets low-rank terms only."""
    resolved = make_adapter(**settings)
    sites = {site: SiteUpdate(update.a, update.b) for site, update in resolved.sites.items() if update.a is not None}
    return bind(ResolvedAdapter(resolved.name, "lora", sites, {}), manifest)


@pytest.mark.parametrize("method", ["cat", "task_arithmetic", "svd"])
def test_a_sum_of_everything_is_exact_at_full_rank(method, parts, manifest):
    exact = blend([(part.weight, part.inputs) for part in parts], manifest)
    tensors, lost = combine(parts, manifest, settings_of(method, rank=64 if method == "svd" else None))
    assert check_inputs("new", tensors, manifest).keys() == exact.keys()
    assert relative_error(tensors, exact, manifest) < 1e-6
    assert lost < 1e-6
    products = {slot.inputs[term] for slot in manifest.slots for term in ("a", "b") if term in slot.inputs}
    for name in exact.keys() - products:
        assert tensors[name].tobytes() == exact[name].tobytes()


def test_a_sum_of_equal_adapters_has_their_rank(manifest, make_adapter):
    inputs = plain(manifest, make_adapter, rank=2)
    twice = [Part("one", 0.5, inputs), Part("two", 0.25, inputs)]
    summed, _ = combine(twice, manifest, settings_of("task_arithmetic"))
    assert {name: value.shape for name, value in summed.items()} == {name: x.shape for name, x in inputs.items()}
    side_by_side, _ = combine(twice, manifest, settings_of("cat"))
    assert side_by_side["layer.q.lora_A"].shape == (4, 4)
    assert relative_error(summed, side_by_side, manifest) < 1e-6


def test_svd_is_the_best_product_of_its_rank_and_says_its_error(products, one_slot):
    exact = blend([(part.weight, part.inputs) for part in products], one_slot)
    tensors, lost = combine(products, one_slot, settings_of("svd", rank=3))
    values = np.linalg.svd(np.float64(exact["A"]) @ exact["B"], compute_uv=False)
    best = np.sqrt((values[3:] ** 2).sum() / (values**2).sum())
    assert tensors["A"].shape == (24, 3)
    assert lost == pytest.approx(best, rel=1e-6)
    assert relative_error(tensors, exact, one_slot) == pytest.approx(best, rel=1e-6)
    assert relative_error({}, exact, one_slot) == pytest.approx(1)
    own, _ = combine(products, one_slot, settings_of("svd"))
    assert own["A"].shape == (24, 4)


@pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("method", PRUNING)
def test_peft_s_formulas(method, density, products, one_slot, monkeypatch):
    """With the same draws of chance peft's functions give the same change."""
    draws = np.random.default_rng(7)
    monkeypatch.setattr(
        torch, "bernoulli", lambda like: torch.from_numpy(draws.random(tuple(like.shape)) < density).double()
    )
    changes = [torch.from_numpy(part.inputs["A"] @ part.inputs["B"]) for part in products]
    expected = getattr(merge_utils, method)(changes, torch.tensor(WEIGHTS, dtype=torch.float64), density=density)
    seed = 7 if method in RANDOM else None
    tensors, lost = combine(products, one_slot, settings_of(method, density=density, rank=20, seed=seed))
    error = np.linalg.norm(tensors["A"] @ tensors["B"] - expected.numpy()) / np.linalg.norm(expected.numpy())
    assert error < 1e-6
    assert lost < 1e-6


def test_dare_has_the_sum_as_its_expectation(products, one_slot):
    exact = sum(part.weight * part.inputs["A"] @ part.inputs["B"] for part in products)
    mean, first = np.zeros_like(exact), None
    for seed in range(400):
        tensors, _ = combine(products, one_slot, settings_of("dare_linear", density=0.5, rank=20, seed=seed))
        change = tensors["A"] @ tensors["B"]
        first = change if first is None else first
        mean += change / 400
    assert np.linalg.norm(first - exact) > 0.5 * np.linalg.norm(exact)
    assert np.linalg.norm(mean - exact) < 0.1 * np.linalg.norm(exact)


def test_linear_is_no_sum(products, one_slot):
    tensors, _ = combine(products, one_slot, settings_of("linear"))
    roots = [np.sqrt(abs(weight)) for weight in WEIGHTS]
    a = sum(np.sign(w) * root * part.inputs["A"] for w, root, part in zip(WEIGHTS, roots, products, strict=True))
    b = sum(root * part.inputs["B"] for root, part in zip(roots, products, strict=True))
    np.testing.assert_allclose(tensors["A"] @ tensors["B"], a @ b, rtol=1e-4, atol=1e-5)
    exact = blend([(part.weight, part.inputs) for part in products], one_slot)
    assert relative_error(tensors, exact, one_slot) > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_every_slot_gets_what_its_graph_takes_and_the_same_bytes_again(method, manifest, make_adapter):
    parts = [
        Part(name, 0.5, plain(manifest, make_adapter, name=name, seed=seed)) for name, seed in (("one", 1), ("two", 2))
    ]
    tensors, _ = combine(parts, manifest, settings_of(method))
    assert check_inputs("new", tensors, manifest).keys() == parts[0].inputs.keys()
    again, _ = combine(parts, manifest, settings_of(method))
    assert {name: x.tobytes() for name, x in again.items()} == {name: x.tobytes() for name, x in tensors.items()}
    other, _ = combine(parts, manifest, settings_of(method, seed=1 if method in RANDOM else None))
    assert (other["embed.lora_A"].tobytes() == tensors["embed.lora_A"].tobytes()) == (method not in RANDOM)


def test_a_module_that_one_adapter_leaves_alone(manifest, make_adapter):
    inputs = plain(manifest, make_adapter)
    less = {name: value for name, value in inputs.items() if not name.startswith("embed")}
    tensors, _ = combine([Part("one", 0.25, less), Part("two", 0.25, inputs)], manifest, settings_of("linear"))
    np.testing.assert_allclose(
        tensors["embed.lora_A"] @ tensors["embed.lora_B"], 0.25 * inputs["embed.lora_A"] @ inputs["embed.lora_B"], 1e-4
    )


def test_int8_keeps_a_concatenation(products, one_slot):
    """Each rank has a scale of its own, so codes and their weights stay what they are."""
    stored = [Part(part.name, part.weight, as_stored(part.inputs, "int8")) for part in products]
    tensors, _ = combine(stored, one_slot, settings_of("cat"))
    exact = blend([(part.weight, part.inputs) for part in stored], one_slot)
    assert relative_error(as_stored(tensors, "int8"), exact, one_slot) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "slerp"},
            (
                "there is no method 'slerp' of blending\nHint: use one of cat, linear, svd, ties, dare_ties, "
                "dare_linear, magnitude_prune, task_arithmetic"
            ),
        ),
        (
            {"method": "cat", "rank": 4},
            (
                "--rank 4 means nothing to the method 'cat'\nHint: leave it out, or choose one of svd, ties, "
                "dare_ties, dare_linear, magnitude_prune"
            ),
        ),
        (
            {"method": "ties", "seed": 1},
            "--seed 1 means nothing to the method 'ties'\nHint: leave it out, or choose one of dare_ties, dare_linear",
        ),
        (
            {"method": "ties", "density": 0.0},
            "--density 0.0: a share of numbers above 0 and at most 1\nHint: try 0.5",
        ),
        ({"method": "svd", "rank": 0}, "--rank 0: a rank of at least 1\nHint: leave it out for the adapters' own"),
        ({"method": "dare_ties", "seed": -1}, "--seed -1: a seed of at least 0\nHint: leave it out for 0"),
    ],
)
def test_settings_that_mean_nothing(arguments, message):
    with pytest.raises(BundleError) as caught:
        settings_of(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("extra", "weight", "method", "message"),
    [
        (
            "layer.c.input_gain",
            1.0,
            "linear",
            (
                "adapter 'one' sets 'layer.c.input_gain' at 'layer.c', and linear is defined for low-rank changes of "
                "weights only\nHint: use one of cat, task_arithmetic, svd, which sum everything that an adapter sets"
            ),
        ),
        (
            "layer.q.gain",
            1.0,
            "ties",
            (
                "adapter 'one' sets 'layer.q.gain' at 'layer.q', and ties is defined for low-rank changes of "
                "weights only\nHint: use one of cat, task_arithmetic, svd, which sum everything that an adapter sets"
            ),
        ),
        (
            "classifier.bias",
            1.0,
            "linear",
            (
                "adapter 'one' sets 'classifier.bias' at 'classifier.bias', and linear is defined for low-rank changes "
                "of weights only\nHint: use one of cat, task_arithmetic, svd, which sum everything that an adapter sets"
            ),
        ),
        (
            "prefix.0.key",
            1.0,
            "cat",
            (
                "adapter 'one' begins texts with virtual tokens: keys of two prefixes do not add, nor does a share "
                "of one mean anything\nHint: leave it out of the blend"
            ),
        ),
        (
            None,
            0.0,
            "cat",
            (
                "the weight of adapter 'one' is 0.0, must be a number other than 0\n"
                "Hint: leave the adapter out, or give a number such as 0.7"
            ),
        ),
    ],
)
def test_what_cannot_be_combined(extra, weight, method, message, manifest, make_adapter):
    assert is_prefix_tensor("prefix.0.key")
    inputs = plain(manifest, make_adapter) | ({extra: np.ones(2, np.float32)} if extra else {})
    with pytest.raises(BundleError) as caught:
        combine([Part("one", weight, inputs)], manifest, settings_of(method))
    assert str(caught.value) == message


def test_linear_needs_equal_ranks(manifest, make_adapter):
    parts = [Part(name, 0.5, plain(manifest, make_adapter, rank=rank)) for name, rank in (("one", 2), ("two", 3))]
    with pytest.raises(BundleError) as caught:
        combine(parts, manifest, settings_of("linear"))
    assert str(caught.value) == (
        "linear adds A to A and B to B, but at module 'layer.q' the ranks differ: one 2, two 3\n"
        "Hint: use cat, which is exact for all ranks, or svd"
    )


def test_a_density_that_keeps_nothing(products, one_slot):
    with pytest.raises(BundleError) as caught:
        combine(products, one_slot, settings_of("ties", density=0.001))
    assert str(caught.value) == (
        "nothing is left of the adapters: ties at density 0.001 keeps no number\nHint: choose a larger --density"
    )
