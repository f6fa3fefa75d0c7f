from __future__ import annotations

import dataclasses
import json

import pytest

from edgeadapt.bundle.manifest import FileRecord
from edgeadapt.bundle.names import check_adapter_name, check_file_path
from edgeadapt.bundle.rules import check_manifest, dump_manifest, parse_manifest
from edgeadapt.errors import BundleError
from edgeadapt.slots import GraphRecord, ParameterSlot

SHA = "0" * 64
HINT = "the bundle is damaged or was not written by edgeadapt; export it again"


@pytest.fixture
def listed(manifest):
    files = {name: FileRecord(1, SHA, "graph") for name in ("graph/model.plain.onnx", "graph/model.slots.onnx")}
    return dataclasses.replace(manifest, files=files)


def test_there_and_back(listed):
    data = dump_manifest(listed)
    parsed = parse_manifest(data, "f")
    assert dataclasses.replace(parsed, digest="") == listed
    assert dump_manifest(parsed) == data


def _content(listed):
    return json.loads(dump_manifest(listed))


def _refused(data, message):
    with pytest.raises(BundleError) as caught:
        parse_manifest(data, "f")
    assert caught.value.message == message


def test_other_formats_and_changes(listed):
    content = _content(listed)
    _refused(b"[]", "f: schema is None, this version of edgeadapt reads 'edgeadapt.bundle/1'")
    newer = json.dumps(content | {"schema": "edgeadapt.bundle/2"}).encode()
    _refused(newer, "f: schema is 'edgeadapt.bundle/2', this version of edgeadapt reads 'edgeadapt.bundle/1'")
    _refused(json.dumps(content | {"later": 1}).encode(), "f: unknown field later")
    del content["task"]
    _refused(json.dumps(content).encode(), "f: field task is missing")
    changed = _content(listed) | {"name": "other"}
    _refused(json.dumps(changed).encode(), "f: its digest does not match: it was changed after it was written")
    compact = json.dumps(_content(listed)).encode()
    _refused(compact, "f: not in canonical form: it was changed after it was written")


def test_every_flipped_bit_is_found(listed):
    small = dataclasses.replace(
        listed,
        slots=(),
        parameters=(),
        files={},
        graphs={"model": GraphRecord("graph/model.plain.onnx", None, (), ())},
        base=dataclasses.replace(
            listed.base, modules=(), fingerprint="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        ),
    )
    small = dataclasses.replace(small, files={"graph/model.plain.onnx": FileRecord(1, SHA, "graph")})
    data = dump_manifest(small)
    parse_manifest(data, "f")
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        with pytest.raises(BundleError):
            parse_manifest(bytes(changed), "f")


def _slot(manifest, **changes):
    return {"slots": (dataclasses.replace(manifest.slots[0], **changes), *manifest.slots[1:])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda _: {"schema": "x"}, "f: schema is 'x', must be 'edgeadapt.bundle/1'"),
        (lambda _: {"adapter_dtype": "int4"}, "f: adapter_dtype is 'int4', must be one of float32, float16, int8"),
        (lambda _: {"graphs": {}}, "f: graphs is empty"),
        (
            lambda m: {"merged": "x", "files": m.files},
            "f: adapter 'x' is merged, so there can be no slots and no adapters",
        ),
        (lambda m: {"slots": (*m.slots, m.slots[0])}, "f: slot 'layer.q' occurs twice"),
        (lambda m: _slot(m, site="nowhere"), "f: slot 'nowhere' is not a module of the base"),
        (
            lambda m: _slot(m, type="dense"),
            "f: type of slot 'layer.q' is 'dense', must be one of linear, conv1d, conv2d, embedding, norm, other",
        ),
        (lambda m: _slot(m, graphs=()), "f: slot 'layer.q' is in no graph"),
        (lambda m: _slot(m, graphs=("decoder",)), "f: slot 'layer.q' names graph 'decoder', which has no slots"),
        (lambda m: _slot(m, inputs={"a": "x"}), "f: slot 'layer.q' has the terms ['a']: a and b go together"),
        (
            lambda m: _slot(m, inputs={"c": "x"}),
            "f: term of slot 'layer.q' is 'c', must be one of a, b, gain, offset, input_gain",
        ),
        (
            lambda m: _slot(m, type="conv2d", inputs={"input_gain": "x"}),
            "f: slot 'layer.q' is of type 'conv2d', which has no input_gain",
        ),
        (lambda m: _slot(m, inputs={"gain": "norm.gain"}), "f: adapter input 'norm.gain' occurs twice"),
        (
            lambda m: _slot(m, inputs={"gain": "input_ids"}),
            "f: adapter input 'input_ids' is a data input of graph 'model'",
        ),
        (
            lambda _: {"parameters": (ParameterSlot("p", ("model",), "p", (0, "n")),)},
            "f: parameter slot 'p' has the shape [0, 'n']",
        ),
        (
            lambda m: {"files": m.files | {"graph/more.onnx": FileRecord(1, SHA, "graph")}},
            "f: graph file 'graph/more.onnx' is in files but not in graphs",
        ),
        (lambda _: {"files": {}}, "f: graph file 'graph/model.plain.onnx' is in graphs but not in files"),
        (
            lambda m: {"files": m.files | {"assets/a": FileRecord(-1, SHA, "asset")}},
            f"f: size or digest of assets/a is not one: -1, '{SHA}'",
        ),
        (
            lambda m: {"files": m.files | {"assets/a": FileRecord(1, "x", "asset")}},
            "f: size or digest of assets/a is not one: 1, 'x'",
        ),
        (
            lambda m: {"files": m.files | {"assets/a": FileRecord(1, SHA, "graph")}},
            "f: role of assets/a is 'graph', must be 'asset'",
        ),
        (
            lambda m: {"files": m.files | {"manifest.json": FileRecord(1, SHA, "asset")}},
            "f: role of manifest.json is 'asset', must be None",
        ),
        (
            lambda m: {
                "files": m.files | {"assets/a": FileRecord(1, SHA, "asset"), "assets/A": FileRecord(1, SHA, "asset")}
            },
            "f: path but for case 'assets/a' occurs twice",
        ),
        (
            lambda m: {"files": m.files | {"adapters/x/adapter.json": FileRecord(1, SHA, "adapter")}},
            "f: file 'adapters/x/adapter.json' belongs to no adapter",
        ),
        (lambda m: {"base": dataclasses.replace(m.base, fingerprint="x")}, None),
    ],
)
def test_rules(listed, changes, message):
    changed = dataclasses.replace(listed, **changes(listed))
    with pytest.raises(BundleError) as caught:
        check_manifest(changed, "f")
    expected = message or f"f: base.fingerprint is x, its modules give {listed.base.fingerprint}"
    assert (caught.value.message, caught.value.hint) == (expected, HINT)
    with pytest.raises(BundleError):
        dump_manifest(changed)


def test_an_adapter_needs_its_files(listed, record):
    with pytest.raises(BundleError) as caught:
        check_manifest(dataclasses.replace(listed, adapters={"one": record}), "f")
    assert caught.value.message == "f: adapter 'one' has no file 'adapters/one/adapter.json'"


@pytest.mark.parametrize("path", ["a", "a/b.json", "assets/Ünï code.txt", "a/b-c_d.e+f"])
def test_good_paths(path):
    check_file_path(path, "f")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        "a/./b",
        "C:/a",
        "a\\b",
        "a\0b",
        "a\nb",
        ".a",
        "a/.b",
        "a/nul",
        "con.txt",
        "a.",
        "a /b",
        "a?",
        "a/" + "x" * 256,
    ],
)
def test_bad_paths(path):
    with pytest.raises(BundleError) as caught:
        check_file_path(path, "f")
    assert caught.value.message == f"f: {path!r} is not a path that a bundle may hold"


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "x" * 64, "0", "console"])
def test_good_names(name):
    check_adapter_name(name, ["other", name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "1 to 64 letters"),
        ("x" * 65, "1 to 64 letters"),
        ("a/b", "1 to 64 letters"),
        ("..", "1 to 64 letters"),
        (".a", "1 to 64 letters"),
        ("a.", "1 to 64 letters"),
        ("a b", "1 to 64 letters"),
        ("é", "1 to 64 letters"),
        ("a\n", "1 to 64 letters"),
        ("none", "stands for the bare base"),
        ("Base", "stands for the bare base"),
        ("nul", "cannot be a folder on Windows"),
        ("COM1.x", "cannot be a folder on Windows"),
        ("OTHER", "differs from 'other' only in case: one folder on Windows and macOS"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(BundleError) as caught:
        check_adapter_name(name, ["other"])
    assert caught.value.message.startswith(f"adapter name {name!r}")
    assert message in caught.value.message
    assert caught.value.hint == "choose another name with --name"
