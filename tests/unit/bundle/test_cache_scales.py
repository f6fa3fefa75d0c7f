from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgeadapt.adapters.adapter import Prefix
from edgeadapt.bundle.bundle import Bundle, open_bundle
from edgeadapt.bundle.cache_scales import prefix_codes, read_cache_scales
from edgeadapt.bundle.rules import check_manifest
from edgeadapt.bundle.verify import Finding, verify_files
from edgeadapt.bundle.write import write_manifest
from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import BundleError
from edgeadapt.fields import to_mapping
from edgeadapt.slots import GraphRecord

SPEC = DecoderSpec(2, 2, 3, 0, 16, 32, shared_cache=True, eos_token_ids=(), cache_dtype="int8", cache_scales=64)
SHAPE = (2, 2, 2, 1, 3)


@pytest.fixture
def scales() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.01, 0.02, SHAPE).astype(np.float32)


@pytest.fixture
def write(tmp_path, manifest):
    """Write a bundle whose weights file is 64 bytes and these scales, with these fields of the generation record."""

    def make(scales: np.ndarray, **changes) -> Bundle:
        folder = tmp_path / "b.bundle"
        (folder / "graph").mkdir(parents=True)
        (folder / "graph" / "decoder.plain.onnx").write_bytes(b"graph")
        (folder / "graph" / "weights.bin").write_bytes(b"w" * 64 + scales.tobytes())
        graphs = {"decoder": GraphRecord("graph/decoder.plain.onnx", None, ("input_ids",), ("logits",))}
        record = {**to_mapping(SPEC), **changes}
        written = dataclasses.replace(
            manifest, task="text-generation", graphs=graphs, slots=(), parameters=(), generation=record
        )
        write_manifest(folder, written)
        return open_bundle(folder)

    return make


def test_scales_are_read_where_the_manifest_says(write, scales):
    bundle = write(scales)
    found = read_cache_scales(bundle, SPEC)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, scales)
    assert verify_files(bundle) == []


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_none_are_found(write, scales, bad):
    scales[1, 0, 1, 0, 2] = bad
    bundle = write(scales)
    with pytest.raises(BundleError) as caught:
        read_cache_scales(bundle, SPEC)
    problem = f"{bundle.path}/graph/weights.bin: a scale of the key-value cache is no number above 0"
    assert str(caught.value) == f"{problem}\nHint: export the bundle or copy it again"
    assert verify_files(bundle) == [Finding("graph/weights.bin", problem)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cache_scales": None},
            "generation has cache_dtype 'int8' with cache_scales None and shared_cache true: ",
        ),
        (
            {"cache_dtype": "float32"},
            "generation has cache_dtype 'float32' with cache_scales 64 and shared_cache true: ",
        ),
        (
            {"shared_cache": False},
            "generation has cache_dtype 'int8' with cache_scales 64 and shared_cache false: ",
        ),
        ({"cache_scales": 68}, "generation.cache_scales is 68: there are no 96 bytes of graph/weights.bin"),
        ({"cache_scales": -4}, "generation.cache_scales is -4: there are no 96 bytes of graph/weights.bin"),
        ({"cache_scales": 62}, "generation.cache_scales is 62: there are no 96 bytes of graph/weights.bin"),
        (
            {"cache_dtype": "int4"},
            "field cache_dtype must be one of 'float32', 'int8', got the string 'int4'",
        ),
    ],
)
def test_a_record_that_cannot_be_is_refused(write, scales, changes, message):
    bundle = write(scales)
    broken = dataclasses.replace(bundle.manifest, generation={**to_mapping(SPEC), **changes})
    with pytest.raises(BundleError) as caught:
        check_manifest(broken, "manifest.json")
    message += "int8 goes with scales and a shared cache" if message.endswith(": ") else ""
    assert caught.value.message in (f"manifest.json: {message}", f"manifest.json: generation: {message}")


def test_a_record_from_before_is_a_float_cache(write, scales):
    bundle = write(scales)
    record = {key: value for key, value in to_mapping(SPEC).items() if key not in ("cache_dtype", "cache_scales")}
    check_manifest(dataclasses.replace(bundle.manifest, generation=record), "manifest.json")
    assert DecoderSpec(**record).cache_dtype == "float32"


def test_a_prefix_becomes_codes_on_the_same_scales(scales):
    wanted = np.random.default_rng(1).integers(-127, 128, (2, 2, 2, 4, 3)).astype(np.int8)
    held = wanted * scales
    prefix = Prefix(tuple(held[:, 0]), tuple(held[:, 1]))
    codes = prefix_codes("p", prefix, scales)
    assert {part.dtype for part in (*codes.keys, *codes.values)} == {np.dtype(np.int8)}
    np.testing.assert_array_equal(np.stack([codes.keys, codes.values], axis=1), wanted)
    held[1, 1, 1, 3, 2] = -128 * scales[1, 1, 1, 0, 2]
    with pytest.raises(BundleError) as caught:
        prefix_codes("p", prefix, scales)
    assert str(caught.value) == (
        f"adapter 'p': 'prefix.1.value' holds {held[1, 1, 1, 3, 2]:.3g}, and this bundle's key-value cache in int8 "
        f"holds {127 * scales[1, 1, 1, 0, 2]:.3g} there at most\n"
        "Hint: export the bundle again together with this adapter, so that its range is known, or without "
        "--kv-cache int8"
    )
