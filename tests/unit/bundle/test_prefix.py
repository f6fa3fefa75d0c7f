"""Prefixes in a bundle: bound, stored, there and back; those that do not fit, with the whole message."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgeadapt.adapters.adapter import Prefix, ResolvedAdapter
from edgeadapt.bundle.bind import bind, check_inputs, unbind
from edgeadapt.bundle.blend import blend
from edgeadapt.bundle.manifest import AdapterRecord
from edgeadapt.bundle.prefix import check_prefix_tokens, is_prefix_tensor
from edgeadapt.bundle.stored import as_stored, to_stored
from edgeadapt.errors import BundleError
from edgeadapt.slots import GraphRecord

FIT = "check that the adapter was trained on this bundle's base"
DAMAGED = "the adapter's file is damaged or from elsewhere; remove the adapter and add it again"
SHAPE = (2, 3, 4)


@pytest.fixture
def decoder(manifest):
    """A manifest of a decoder with two layers of two heads of 4 and eight positions."""
    generation = {
        "cache_layers": 2,
        "cache_heads": 2,
        "cache_head_dim": 4,
        "cross_layers": 0,
        "max_length": 8,
        "vocab_size": 9,
        "shared_cache": True,
        "eos_token_ids": [],
    }
    graphs = {"decoder": GraphRecord("graph/decoder.plain.onnx", None, ("input_ids",), ("logits",))}
    return dataclasses.replace(manifest, generation=generation, graphs=graphs, slots=(), parameters=())


def prefix(layers=2, shape=SHAPE):
    generator = np.random.default_rng(0)
    drawn = [generator.standard_normal(shape).astype(np.float32) for _ in range(2 * layers)]
    return Prefix(tuple(drawn[:layers]), tuple(drawn[layers:]))


def adapter(found):
    return ResolvedAdapter("p", "virtual_tokens", {}, {}, found)


def test_there_and_back(decoder):
    wanted = prefix()
    bound = bind(adapter(wanted), decoder)
    assert list(bound) == ["prefix.0.key", "prefix.0.value", "prefix.1.key", "prefix.1.value"]
    found = unbind("p", bound, decoder).prefix
    assert found.tokens == 3
    for one, other in zip((*wanted.keys, *wanted.values), (*found.keys, *found.values), strict=True):
        assert np.array_equal(one, other)
    assert check_inputs("p", bound, decoder).keys() == bound.keys()
    assert {str(value.dtype) for value in to_stored(bound, "int8").values()} == {"float16"}
    stored = as_stored(bound, "float16")
    assert all(np.abs(stored[name] - value).max() <= 1e-3 * np.abs(value).max() for name, value in bound.items())


def test_names():
    assert [is_prefix_tensor(name) for name in ("prefix.0.key", "prefix.10.value")] == [True, True]
    others = ("prefix.00.key", "prefix.0.key.scale", "prefix.0", "xprefix.0.key", "prefix.-1.key", "prefix.9999999.key")
    assert not any(map(is_prefix_tensor, others))


@pytest.mark.parametrize(
    ("found", "message", "hint"),
    [
        (prefix(layers=3), "adapter 'p' has a prefix for 3 layers, this base has 2", FIT),
        (
            prefix(shape=(1, 3, 4)),
            "adapter 'p': 'prefix.0.key' has the shape [1, 3, 4], this base needs [2, 3, 4]",
            FIT,
        ),
        (
            prefix(shape=(2, 3, 5)),
            "adapter 'p': 'prefix.0.key' has the shape [2, 3, 5], this base needs [2, 3, 4]",
            FIT,
        ),
        (prefix(shape=(3, 4)), "adapter 'p': 'prefix.0.key' has the shape [3, 4], this base needs [2, tokens, 4]", FIT),
        (
            prefix(shape=(2, 8, 4)),
            "adapter 'p' begins every text with 8 virtual tokens, and this model holds 8 tokens",
            "train it with fewer virtual tokens, or export the bundle with a larger --max-length",
        ),
        (
            Prefix((np.full(SHAPE, np.nan, np.float32),) * 2, (np.ones(SHAPE, np.float32),) * 2),
            "adapter 'p': 'prefix.0.key' holds NaN or infinite values",
            "the adapter is damaged; save it again",
        ),
    ],
)
def test_what_does_not_fit(found, message, hint, decoder):
    with pytest.raises(BundleError) as caught:
        bind(adapter(found), decoder)
    assert str(caught.value) == f"{message}\nHint: {hint}"


def test_models_that_are_no_decoder(manifest):
    with pytest.raises(BundleError) as caught:
        bind(adapter(prefix()), manifest)
    assert str(caught.value) == (
        "adapter 'p' begins the text with virtual tokens, and this bundle's model is no decoder-only language model, "
        "whose key-value cache could begin with them\nHint: use such adapters with decoder-only language models"
    )


@pytest.mark.parametrize("missing", ["prefix.1.value", "prefix.0.key"])
def test_half_a_prefix(missing, decoder):
    tensors = {key: value for key, value in bind(adapter(prefix()), decoder).items() if key != missing}
    with pytest.raises(BundleError) as caught:
        check_inputs("p", tensors, decoder)
    assert str(caught.value) == f"adapter 'p' has a prefix without {missing!r}\nHint: {DAMAGED}"
    with pytest.raises(BundleError, match=r"has a prefix without 'prefix\.0\.key'"):
        check_inputs("p", {"prefix.99999.key": np.ones(SHAPE, np.float32)}, decoder)


def test_the_manifest_says_how_long_it_is(decoder):
    tensors = bind(adapter(prefix()), decoder)
    record = AdapterRecord("virtual_tokens", 0, 48, 0.1, 0.1, "shapes", prefix_tokens=3)
    manifest = dataclasses.replace(decoder, adapters={"p": record})
    check_prefix_tokens("p", tensors, manifest)
    other = dataclasses.replace(manifest, adapters={"p": dataclasses.replace(record, prefix_tokens=2)})
    with pytest.raises(BundleError) as caught:
        check_prefix_tokens("p", tensors, other)
    assert str(caught.value) == f"adapter 'p' has a prefix of 3 tokens, the manifest says 2\nHint: {DAMAGED}"


def test_blends(decoder):
    tensors = bind(adapter(prefix()), decoder)
    alone = blend([(1.0, tensors), (0.0, tensors)], decoder)
    assert all(np.array_equal(alone[name], value) for name, value in tensors.items())
    for weights in ((0.5,), (1.0, 1.0), (2.0, -1.0)):
        with pytest.raises(BundleError) as caught:
            blend([(weight, tensors) for weight in weights], decoder)
        assert str(caught.value) == (
            "an adapter of the blend begins the text with virtual tokens: keys of two prefixes do not add, nor does a "
            "share of one mean anything\nHint: use that adapter alone, with weight 1"
        )
