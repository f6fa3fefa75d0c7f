from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from edgeadapt.bundle.adapter_json import dump_adapter_json
from edgeadapt.bundle.bundle import open_bundle
from edgeadapt.bundle.golden import dump_golden
from edgeadapt.bundle.manifest import FileRecord
from edgeadapt.bundle.rules import dump_manifest, manifest_digest
from edgeadapt.bundle.verify import Finding, verify_files
from edgeadapt.errors import BundleError
from edgeadapt.files import canonical_json
from edgeadapt.onnx_adapter import dump_onnx_adapter

ADAPTER = "adapters/one/adapter.onnx_adapter"
JSON = "adapters/one/adapter.json"
GOLDEN = "adapters/one/golden.safetensors"


def verify(bundle):
    return verify_files(open_bundle(bundle.path, check_files=False))


def test_a_sound_bundle(make_bundle):
    assert verify(make_bundle("one", "two")) == []
    assert verify(make_bundle()) == []


def test_a_bundle_of_an_earlier_version_that_knew_fewer_fields(make_bundle):
    bundle = make_bundle("one")
    content = json.loads((bundle.path / "manifest.json").read_bytes())
    assert content.pop("bottlenecks") == content.pop("joined") == []
    (bundle.path / "manifest.json").write_bytes(canonical_json({**content, "digest": manifest_digest(content)}))
    assert verify(bundle) == []
    assert verify_files(bundle) == [Finding("manifest.json", "was changed after it was written")]


def test_one_flipped_byte_in_each_file(make_bundle):
    bundle = make_bundle("one")
    files = sorted(path for path in bundle.path.rglob("*") if path.is_file())
    assert len(files) == 9
    random = np.random.default_rng(0)
    for path in files:
        good = path.read_bytes()
        for position in {0, len(good) - 1, *random.integers(0, len(good), 8).tolist()}:
            bad = bytearray(good)
            bad[position] ^= 1 << int(random.integers(8))
            path.write_bytes(bad)
            name = path.relative_to(bundle.path).as_posix()
            assert name in {finding.path for finding in verify_files(bundle)}, (name, position)
            if name == "manifest.json":
                with pytest.raises(BundleError, match=r"manifest\.json"):
                    open_bundle(bundle.path)
        path.write_bytes(good)
    assert verify(bundle) == []


def test_missing_extra_and_left_over_files(make_bundle, tmp_path):
    bundle = make_bundle("one")
    (bundle.path / "assets" / "config.json").unlink()
    (bundle.path / "assets" / "more.txt").write_text("x")
    (bundle.path / "empty").mkdir()
    (bundle.path / ".hidden").write_text("x")
    left = bundle.path / "adapters" / ".two.tmp-0123abcd"
    left.mkdir()
    (left / "adapter.json").write_text("x")
    weights = bundle.path / "graph" / "weights.bin"
    weights.rename(tmp_path / "w")
    weights.symlink_to(tmp_path / "w")
    assert verify(bundle) == [
        Finding(".hidden", "is not in the manifest"),
        Finding("adapters/.two.tmp-0123abcd", "a leftover of an interrupted change; the next add removes it"),
        Finding("assets/config.json", "is missing"),
        Finding("assets/more.txt", "is not in the manifest"),
        Finding("empty", "is not in the manifest"),
        Finding("graph/weights.bin", "is a symbolic link"),
    ]


def forge(bundle, path, data, **changes):
    """Change a file and the manifest with it, as someone would who knows the format."""
    (bundle.path / path).write_bytes(data)
    files = dict(bundle.manifest.files)
    files[path] = FileRecord(len(data), hashlib.sha256(data).hexdigest(), files[path].role)
    manifest = dataclasses.replace(bundle.manifest, files=files, **changes)
    (bundle.path / "manifest.json").write_bytes(dump_manifest(manifest))
    return open_bundle(bundle.path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"input_ids": np.ones(3, np.float32)},
            "adapter 'one' sets 'input_ids', which is a data input of graph 'model'",
        ),
        (
            {"other.lora_A": np.ones(3, np.float32)},
            "adapter 'one' sets 'other.lora_A', which is no adapter input of this bundle",
        ),
        (
            {"norm.gain": np.ones(5, np.float32)},
            "adapter 'one': gain of module 'norm' has the shape [5], this base needs [4]",
        ),
        ({"norm.gain": None}, None),
        ({"layer.q.lora_A": None}, "adapter 'one' has only half of the pair A, B at module 'layer.q'"),
    ],
)
def test_an_adapter_with_tensors_that_it_may_not_have(make_bundle, change, problem):
    bundle = make_bundle("one")
    tensors = {name: value for name, value in (bundle.adapter_tensors("one") | change).items() if value is not None}
    forged = forge(bundle, ADAPTER, dump_onnx_adapter(tensors))
    findings = verify(forged)
    assert [finding.path for finding in findings] == [JSON] + [ADAPTER] * (problem is not None)
    assert "differs from adapter.onnx_adapter" in findings[0].problem
    if problem is not None:
        assert findings[1].problem == problem
        with pytest.raises(BundleError) as caught:
            forged.adapter_tensors("one")
        assert caught.value.message == problem


def test_an_adapter_file_that_is_none(make_bundle):
    forged = forge(make_bundle("one"), ADAPTER, b"x" * 100)
    assert verify(forged) == [
        Finding(ADAPTER, f"{ADAPTER}: not a valid .onnx_adapter file: bytes 4 to 8 are b'xxxx', not b'TORT'")
    ]


def test_records_that_differ(make_bundle):
    bundle = make_bundle("one")
    content = bundle.adapter_json("one")
    tensor = {**content.tensors, "norm.gain": dataclasses.replace(content.tensors["norm.gain"], shape=(5,))}
    for changes, problem in (
        ({"name": "two"}, "its name is 'two'"),
        ({"record": dataclasses.replace(content.record, rank=7)}, "its record differs from the manifest's"),
        ({"base_fingerprint": "x"}, f"made for the base x, the bundle's is {bundle.manifest.base.fingerprint}"),
        ({"tensors": tensor}, "tensor 'norm.gain' differs from adapter.onnx_adapter"),
    ):
        forged = forge(bundle, JSON, dump_adapter_json(dataclasses.replace(content, **changes)))
        assert verify(forged) == [Finding(JSON, problem)]
    forged = forge(bundle, JSON, b"{}\n")
    assert [finding.path for finding in verify(forged)] == [JSON]


def test_goldens_that_differ(make_bundle):
    bundle = make_bundle("one")
    golden = bundle.golden("one")
    forged = forge(bundle, GOLDEN, dump_golden(dataclasses.replace(golden, tolerance=0.5)))
    assert verify(forged) == [Finding(GOLDEN, "its tolerance or minimum effect differs from the manifest's")]
    inputs = {**golden.inputs, "norm.gain": np.ones(4, np.float32)}
    forged = forge(bundle, GOLDEN, dump_golden(dataclasses.replace(golden, inputs=inputs)))
    assert verify(forged) == [Finding(GOLDEN, "it sets 'norm.gain', which only adapters may set")]
    forged = forge(bundle, GOLDEN, b"nonsense")
    assert [finding.path for finding in verify(forged)] == [GOLDEN]
