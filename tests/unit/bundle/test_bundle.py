from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from edgeadapt.bundle.bind import bind
from edgeadapt.bundle.bundle import open_bundle
from edgeadapt.bundle.stored import as_stored
from edgeadapt.bundle.write import adapter_files, write_adapter, write_assets, write_manifest
from edgeadapt.errors import BundleError
from edgeadapt.onnx_adapter import read_onnx_adapter


def test_what_was_written_is_read(make_bundle, make_adapter, manifest, golden):
    bundle = make_bundle("one", "two")
    assert bundle.adapter_names == ("one", "two")
    assert bundle.asset_names == ("config.json", "tokenizer.json")
    assert bundle.asset("config.json") == b"{}\n"
    assert bundle.labels == bundle.labels_of("one") == bundle.labels_of(None) == ("no", "yes")
    assert bundle.file("graph/weights.bin").stat().st_size == 1100
    assert bundle.manifest.files["graph/weights.bin"].role == "weights"
    tensors = bundle.adapter_tensors("two")
    written = bind(make_adapter(seed=1), manifest)
    for name, value in as_stored(written, "float16").items():
        assert tensors[name].tobytes() == value.tobytes()
    for name, value in written.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_allclose(tensors[name], value, rtol=1e-3)
    assert bundle.golden("one").minimum_effect == golden.minimum_effect
    assert bundle.manifest.adapters["one"].tolerance == golden.tolerance
    assert bundle.adapter_json("one").record == bundle.manifest.adapters["one"]


def test_equal_input_gives_equal_bytes(make_bundle, tmp_path):
    one = make_bundle("one", "two", target=tmp_path / "1")
    other = make_bundle("one", "two", target=tmp_path / "2")
    names = sorted(path.relative_to(one.path) for path in one.path.rglob("*") if path.is_file())
    assert len(names) == 12
    for name in names:
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), name


def test_unknown_names(make_bundle):
    bundle = make_bundle("one")
    for call, message, hint in (
        (lambda: bundle.adapter_tensors("two"), "has no adapter 'two'", "adapters of this bundle: one"),
        (lambda: bundle.asset("x"), "has no asset 'x'", "assets of this bundle: config.json, tokenizer.json"),
        (lambda: bundle.file("x"), "has no file 'x'", "run `edgeadapt verify` on the bundle"),
    ):
        with pytest.raises(BundleError) as caught:
            call()
        assert str(caught.value) == f"{bundle.path} {message}\nHint: {hint}"


def test_a_damaged_file_is_found_when_it_is_read(make_bundle):
    bundle = make_bundle("one")
    for path, call in (
        ("assets/config.json", lambda: bundle.asset("config.json")),
        ("adapters/one/adapter.onnx_adapter", lambda: bundle.adapter_tensors("one")),
        ("adapters/one/golden.safetensors", lambda: bundle.golden("one")),
    ):
        data = bytearray(bundle.file(path).read_bytes())
        data[-1] ^= 1
        bundle.file(path).write_bytes(data)
        with pytest.raises(BundleError) as caught:
            call()
        assert caught.value.message == f"{bundle.path / path} is damaged: its SHA-256 is not the manifest's"


def test_what_is_no_bundle(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".x.tmp-12345678").mkdir()
    for name, message in (
        ("nothing", "does not exist"),
        ("file", "is a file, not a bundle folder"),
        ("folder", "has no manifest.json: it is not a bundle"),
        (".x.tmp-12345678", "has no manifest.json: it is an export that did not finish"),
    ):
        with pytest.raises(BundleError) as caught:
            open_bundle(tmp_path / name)
        assert caught.value.message == f"{tmp_path / name} {message}"


def test_missing_and_foreign_files(make_bundle, tmp_path):
    bundle = make_bundle("one")

    def refused(path, problem):
        with pytest.raises(BundleError) as caught:
            open_bundle(bundle.path)
        assert str(caught.value) == (
            f"{bundle.path}: {path} {problem}\nHint: run `edgeadapt verify`, or export it again"
        )
        assert open_bundle(bundle.path, check_files=False).manifest == bundle.manifest

    weights = bundle.path / "graph" / "weights.bin"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    refused("graph/weights.bin", "has 1099 bytes, the manifest says 1100")
    weights.unlink()
    refused("graph/weights.bin", "is missing")
    (tmp_path / "elsewhere").write_bytes(data)
    weights.symlink_to(tmp_path / "elsewhere")
    refused("graph/weights.bin", "is a symbolic link")
    weights.unlink()
    weights.mkdir()
    refused("graph/weights.bin", "is not a plain file")
    weights.rmdir()
    weights.write_bytes(data)
    (bundle.path / "adapters").rename(tmp_path / "adapters")
    (bundle.path / "adapters").symlink_to(tmp_path / "adapters")
    refused("adapters/one/adapter.json", "lies behind the symbolic link adapters")


def test_a_manifest_behind_a_link_is_refused(make_bundle, tmp_path):
    bundle = make_bundle()
    (bundle.path / "manifest.json").rename(tmp_path / "m")
    (bundle.path / "manifest.json").symlink_to(tmp_path / "m")
    with pytest.raises(BundleError, match=r"manifest\.json is not a plain file"):
        open_bundle(bundle.path)


def test_the_bundle_itself_may_be_behind_a_link(make_bundle, tmp_path):
    bundle = make_bundle()
    (tmp_path / "link").symlink_to(bundle.path)
    assert open_bundle(str(tmp_path / "link")).manifest == bundle.manifest


def test_a_merged_bundle(make_bundle, manifest):
    graphs = {"model": dataclasses.replace(manifest.graphs["model"], slots=None)}
    with pytest.raises(BundleError, match=r"graph file 'graph/model.slots.onnx' is in files but not in graphs"):
        make_bundle(merged="one", graphs=graphs, slots=(), parameters=())


def test_files_that_do_not_belong(tmp_path, manifest, golden, record, make_adapter):
    write_assets(tmp_path, {"deep/er/x": b"1"})
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "notes.txt").write_text("x")
    with pytest.raises(BundleError) as caught:
        write_manifest(tmp_path, manifest)
    assert caught.value.message == "'graph/notes.txt' does not belong into a bundle"
    with pytest.raises(BundleError, match=r"'assets/\.\./x' is not a path that a bundle may hold"):
        write_assets(tmp_path, {"../x": b"1"})
    with pytest.raises(BundleError, match="adapter dtype 'int4'"):
        write_adapter(tmp_path, "one", bind(make_adapter(), manifest), record, golden, "int4", base_fingerprint="x")
    with pytest.raises(BundleError, match="stands for the bare base"):
        write_adapter(tmp_path, "none", bind(make_adapter(), manifest), record, golden, "float16", base_fingerprint="x")
    assert not (tmp_path / "adapters").exists()


def test_a_record_that_differs_is_refused(make_bundle, tmp_path, manifest, golden, record, make_adapter):
    bundle = make_bundle()
    tensors = bind(make_adapter(), manifest)
    write_adapter(bundle.path, "one", tensors, record, golden, "float16", base_fingerprint=manifest.base.fingerprint)
    with pytest.raises(BundleError) as caught:
        write_manifest(bundle.path, dataclasses.replace(manifest, adapters={"one": record}))
    assert caught.value.message == "adapter 'one': its adapter.json differs from the manifest"
    assert open_bundle(bundle.path).adapter_names == ()


def test_what_float16_cannot_hold_stays_float32(tmp_path, golden, record):
    tensors = {
        "fits": np.array([1, 0.5, 1e-9], np.float32),
        "huge": np.array([1, 70000], np.float32),
        "tiny": np.array([1e-8, 3e-8], np.float32),
    }
    files, _ = adapter_files("one", tensors, record, golden, "float16", base_fingerprint="x")
    (tmp_path / "a").write_bytes(files["adapter.onnx_adapter"])
    held = read_onnx_adapter(tmp_path / "a").tensors
    assert {name: str(value.dtype) for name, value in held.items()} == {
        "fits": "float16",
        "huge": "float32",
        "tiny": "float32",
    }
    noted = json.loads(files["adapter.json"])["tensors"]
    assert noted["huge"] == {"dtype": "float32", "shape": [2]}
    files, _ = adapter_files("one", tensors, record, golden, "float32", base_fingerprint="x")
    assert {item["dtype"] for item in json.loads(files["adapter.json"])["tensors"].values()} == {"float32"}
