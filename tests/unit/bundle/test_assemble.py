from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgeadapt.bundle.assemble import assemble
from edgeadapt.bundle.stored import to_float32, to_stored, with_scales
from edgeadapt.errors import BundleError
from edgeadapt.onnx_adapter import dump_onnx_adapter
from edgeadapt.slots import Joined, Slot

TERMS = ("a", "b", "gain", "offset")
SIZES = {"q": 6, "k": 3, "v": 4}
INS = 5


@pytest.fixture
def joined(manifest):
    """A manifest with a joined product of three modules, and one module that is computed alone."""
    slots = tuple(
        Slot(site, ("model",), "linear", INS, out, {term: f"{site}.{term}" for term in TERMS})
        for site, out in {**SIZES, "o": 7}.items()
    )
    product = Joined("model", tuple(SIZES), {term: f"qkv.{term}" for term in TERMS})
    return dataclasses.replace(manifest, slots=slots, joined=(product,))


def adapter(ranks, vectors=()):
    rng = np.random.default_rng(0)
    inputs = {}
    for site, rank in ranks.items():
        inputs[f"{site}.a"] = rng.normal(size=(INS, rank)).astype(np.float32)
        inputs[f"{site}.b"] = rng.normal(size=(rank, {**SIZES, "o": 7}[site])).astype(np.float32)
    for name in vectors:
        inputs[name] = rng.normal(size={**SIZES, "o": 7}[name.partition(".")[0]]).astype(np.float32)
    return inputs


def expected(inputs):
    """The joined inputs, module by module in float32, the obvious way."""
    result = {name: value for name, value in inputs.items() if name.startswith("o.")}
    sites = [site for site in SIZES if f"{site}.a" in inputs]
    if sites:
        result["qkv.a"] = np.hstack([inputs[f"{site}.a"] for site in sites])
        rows = []
        for site in sites:
            b = inputs[f"{site}.b"]
            rows.append(
                np.hstack([b if s == site else np.zeros((len(b), out), np.float32) for s, out in SIZES.items()])
            )
        result["qkv.b"] = np.vstack(rows)
    for term, identity in (("gain", 1.0), ("offset", 0.0)):
        if any(f"{site}.{term}" in inputs for site in SIZES):
            default = {site: np.full(out, identity, np.float32) for site, out in SIZES.items()}
            result[f"qkv.{term}"] = np.hstack([inputs.get(f"{site}.{term}", default[site]) for site in SIZES])
    return result


CASES = [
    adapter({"q": 2, "k": 3, "v": 1, "o": 2}),
    adapter({"q": 2, "v": 1}),
    adapter({"k": 4}, ["q.gain", "v.offset", "o.gain"]),
    adapter({}, ["k.gain", "k.offset"]),
    adapter({"o": 1}),
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "mixed"])
@pytest.mark.parametrize("inputs", CASES)
def test_what_is_stored_is_put_together_as_it_would_be_in_float32(joined, inputs, dtype):
    if dtype == "mixed":
        stored = {}
        for index, (name, value) in enumerate(inputs.items()):
            stored |= to_stored({name: value}, ("float16", "int8", "float32")[index % 3])
    else:
        stored = to_stored(inputs, dtype)
    wide = to_float32(stored)
    want = expected(wide)
    tensors = with_scales(stored)
    for found in (assemble(tensors.values, joined, tensors.fill), assemble(wide, joined)):
        assert found.keys() == want.keys()
        for name, value in want.items():
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_all_are_aligned_views_of_one_array(joined):
    found = assemble(CASES[0], joined)
    starts = sorted(value.ctypes.data for value in found.values())
    assert len({start % 64 for start in starts}) == 1
    assert starts[-1] - starts[0] < sum(value.nbytes + 64 for value in found.values())
    assert all(value.flags.c_contiguous for value in found.values())


def test_of_a_bundle(make_bundle):
    bundle = make_bundle("one", "two")
    want = assemble(bundle.adapter_tensors("two"), bundle.manifest)
    found = bundle.graph_tensors("two")
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("read", ["adapter_tensors", "graph_tensors"])
@pytest.mark.parametrize("damage", ["a value", "the format", "a name"])
def test_a_wrong_digest_is_the_error_whatever_else_is_wrong(make_bundle, read, damage):
    bundle = make_bundle("one")
    path = bundle.path / "adapters/one/adapter.onnx_adapter"
    data = bytearray(path.read_bytes())
    if damage == "a value":
        data[-2] ^= 1
    elif damage == "the format":
        data[4:8] = b"XXXX"
    else:
        data = bytearray(dump_onnx_adapter({"unknown": np.ones(3, np.float16)}).ljust(len(data), b"\0"))
    path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        getattr(bundle, read)("one")
    assert caught.value.message == f"{path} is damaged: its SHA-256 is not the manifest's"
