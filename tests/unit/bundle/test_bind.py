from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate
from edgeadapt.bundle.base import base_fingerprint, base_modules, target_modules
from edgeadapt.bundle.bind import bind, check_inputs, unbind
from edgeadapt.errors import BundleError

EXPORT = "export the bundle again together with this adapter, so that its graph gets what the adapter needs"
FIT = "check that the adapter was trained on this bundle's base"


def ones(*shape):
    return np.ones(shape, np.float32)


def test_only_what_the_adapter_sets_is_bound(manifest):
    sites = {"layer.q": SiteUpdate(ones(4, 2), ones(2, 6)), "norm": SiteUpdate(offset=np.ones(4))}
    bound = bind(ResolvedAdapter("x", "lora", sites, {}), manifest)
    assert {name: value.shape for name, value in bound.items()} == {
        "layer.q.lora_A": (4, 2),
        "layer.q.lora_B": (2, 6),
        "norm.offset": (4,),
    }
    assert all(value.dtype == np.float32 and value.flags.c_contiguous for value in bound.values())


def test_every_kind_of_slot_there_and_back(manifest, make_adapter):
    adapter = make_adapter()
    bound = bind(adapter, manifest)
    assert list(bound) == sorted(bound)
    assert set(bound) == {name for slot in manifest.slots for name in slot.inputs.values()} | {
        "classifier.weight",
        "classifier.bias",
    }
    back = unbind("one", bound, manifest)
    assert back.parameter_count == adapter.parameter_count
    np.testing.assert_array_equal(back.sites["layer.conv"].b, adapter.sites["layer.conv"].b)
    again = check_inputs("one", bound, manifest)
    assert all((again[name] == value).all() for name, value in bound.items())


@pytest.mark.parametrize(
    ("sites", "replaced", "message", "hint"),
    [
        (
            {"other": SiteUpdate(ones(3, 1), ones(1, 3))},
            {},
            "adapter 'x' changes module 'other', for which this bundle has no slot",
            EXPORT,
        ),
        (
            {"lay.q": SiteUpdate(ones(3, 1), ones(1, 3))},
            {},
            "adapter 'x' changes module 'lay.q', which the base does not have",
            FIT,
        ),
        (
            {"layer.c": SiteUpdate(ones(4, 1), ones(1, 5), gain=ones(5))},
            {},
            "adapter 'x' needs a gain at module 'layer.c', but this bundle's slot takes only a, b, input_gain",
            EXPORT,
        ),
        (
            {"layer.q": SiteUpdate(input_gain=ones(4))},
            {},
            "adapter 'x' needs an input_gain at module 'layer.q', but this bundle's slot takes only a, b, gain, offset",
            EXPORT,
        ),
        (
            {"layer.c": SiteUpdate(input_gain=ones(5))},
            {},
            "adapter 'x': input_gain of module 'layer.c' has the shape [5], this base needs [4]",
            FIT,
        ),
        (
            {"layer.conv": SiteUpdate(input_gain=ones(2))},
            {},
            "adapter 'x' has an input_gain at module 'layer.conv' of type 'conv2d'",
            FIT,
        ),
        ({"layer.q": SiteUpdate()}, {}, "adapter 'x' names module 'layer.q' but changes nothing there", FIT),
        (
            {"layer.q": SiteUpdate(a=ones(4, 2))},
            {},
            "adapter 'x' has only half of the pair A, B at module 'layer.q'",
            FIT,
        ),
        ({"layer.q": SiteUpdate(ones(4, 0), ones(0, 6))}, {}, "adapter 'x' has rank 0 at module 'layer.q'", FIT),
        (
            {"layer.q": SiteUpdate(ones(5, 2), ones(2, 6))},
            {},
            "adapter 'x': A of module 'layer.q' has the shape [5, 2], this base needs [4, 2]",
            FIT,
        ),
        (
            {"layer.q": SiteUpdate(ones(4, 2), ones(2, 5))},
            {},
            "adapter 'x': B of module 'layer.q' has the shape [2, 5], this base needs [2, 6]",
            FIT,
        ),
        (
            {"layer.q": SiteUpdate(ones(4, 3), ones(2, 6))},
            {},
            "adapter 'x': A of module 'layer.q' has the shape [4, 3], this base needs [4, 2]",
            FIT,
        ),
        (
            {"layer.q": SiteUpdate(gain=ones(4))},
            {},
            "adapter 'x': gain of module 'layer.q' has the shape [4], this base needs [6]",
            FIT,
        ),
        (
            {"layer.conv": SiteUpdate(ones(2, 2, 1, 1), ones(8, 2, 1, 1))},
            {},
            "adapter 'x': A of module 'layer.conv' has the shape [2, 2, 1, 1], this base needs [2, 2, 3, 3]",
            FIT,
        ),
        (
            {"embed": SiteUpdate(ones(9, 2), ones(2, 4))},
            {},
            "adapter 'x': A of module 'embed' has the shape [9, 2], this base needs [10, 2]",
            FIT,
        ),
        (
            {"norm": SiteUpdate(ones(4, 2), ones(2, 4))},
            {},
            "adapter 'x' has a low-rank term at module 'norm' of type 'norm'",
            FIT,
        ),
        (
            {"norm": SiteUpdate(offset=np.full(4, np.nan))},
            {},
            "adapter 'x': 'norm.offset' holds NaN or infinite values",
            "the adapter is damaged; save it again",
        ),
        (
            {"norm": SiteUpdate(offset=np.full(4, 1e300))},
            {},
            "adapter 'x': 'norm.offset' does not fit into float32",
            "the adapter is damaged",
        ),
        (
            {},
            {"pooler.weight": ones(4, 4)},
            "adapter 'x' changes parameter 'pooler.weight', for which this bundle has no slot",
            EXPORT,
        ),
        (
            {},
            {"classifier.weight": ones(3, 5)},
            "adapter 'x': parameter 'classifier.weight' has the shape [3, 5], this bundle needs [num_labels, 4]",
            FIT,
        ),
        (
            {},
            {"classifier.weight": ones(3, 4), "classifier.bias": ones(2)},
            (
                "adapter 'x': parameter 'classifier.weight' has the shape [3, 4], this bundle needs [2, 4] "
                "(as classifier.bias has it)"
            ),
            FIT,
        ),
        (
            {},
            {"classifier.weight": ones(3, 4)},
            (
                "adapter 'x' sets 'classifier.weight' with num_labels = 3, but not 'classifier.bias', "
                "which must have the same num_labels"
            ),
            "save both parameters with the adapter (modules_to_save)",
        ),
        (
            {},
            {"classifier.weight": ones(0, 4), "classifier.bias": ones(0)},
            "adapter 'x': parameter 'classifier.bias' has the shape [0], this bundle needs [num_labels]",
            FIT,
        ),
        ({}, {}, "adapter 'x' changes nothing", "check that it was trained and saved"),
    ],
)
def test_refusals(manifest, sites, replaced, message, hint):
    with pytest.raises(BundleError) as caught:
        bind(ResolvedAdapter("x", "lora", sites, replaced), manifest)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_half_a_head_of_the_bases_own_size(manifest):
    assert list(bind(ResolvedAdapter("x", "lora", {}, {"classifier.weight": ones(2, 4)}), manifest)) == [
        "classifier.weight"
    ]


def test_a_merged_bundle_takes_no_adapter(manifest, make_adapter):
    with pytest.raises(BundleError) as caught:
        bind(make_adapter(), dataclasses.replace(manifest, merged="sales"))
    assert str(caught.value) == (
        "bundle 'toy' has no slots: adapter 'sales' was merged into it\n"
        "Hint: export without --merge to get a bundle that takes adapters"
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [("input_ids", "a data input of graph 'model'"), ("more", "no adapter input of this bundle")],
)
def test_an_adapter_cannot_set_other_inputs(manifest, name, what):
    with pytest.raises(BundleError) as caught:
        check_inputs("x", {name: ones(1)}, manifest)
    assert caught.value.message == f"adapter 'x' sets {name!r}, which is {what}"


def test_the_base_there_and_back(manifest, modules):
    again = target_modules(manifest)
    assert list(again) == sorted(modules)
    assert again == modules
    assert base_modules(again) == manifest.base.modules


def test_the_fingerprint_is_of_paths_and_digests(modules):
    fingerprint = base_fingerprint(modules)
    assert fingerprint == base_fingerprint(reversed(base_modules(modules)))
    renamed = [dataclasses.replace(module, path=f"x{module.path}") for module in base_modules(modules)]
    changed = [dataclasses.replace(module, digest="0" * 64) for module in base_modules(modules)]
    assert len({fingerprint, base_fingerprint(renamed), base_fingerprint(changed)}) == 3
    assert base_fingerprint([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert len(json.dumps(fingerprint)) == 66
