"""add, remove, verify and inspect: what they ask of the library and what they show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeadapt.bundle import Finding


@pytest.fixture
def asked(replace, bundle):
    calls: list[tuple] = []

    def add_adapter(path, adapter, *, name, base, force, progress):
        calls.append(("add", path, adapter, name, base, force))
        return bundle

    def remove_adapter(path, name, *, progress):
        calls.append(("remove", path, name))
        return bundle

    def verify_bundle(path, *, progress):
        calls.append(("verify", path))
        return [] if path.name == "good" else [Finding("a.onnx", "is [r, in]"), Finding("b.onnx", "is missing")]

    replace("edgeadapt.addition", add_adapter=add_adapter, remove_adapter=remove_adapter, verify_bundle=verify_bundle)
    return calls


def test_add(invoke, asked):
    result = invoke("add", "b", "an adapter", "--name", "x", "--base", "hub/id", "--force", "--json")
    assert asked == [("add", Path("b"), Path("an adapter"), "x", "hub/id", True)]
    assert list(json.loads(result.stdout)["adapters"]) == ["sql[r, in]"]
    invoke("add", "b", "a")
    assert asked[1] == ("add", Path("b"), Path("a"), None, None, False)


def test_remove(invoke, asked):
    result = invoke("remove", "b", "x", "--quiet")
    assert asked == [("remove", Path("b"), "x")]
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_verify_of_a_good_bundle(invoke, asked):
    result = invoke("verify", "good", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"ok": True, "findings": []})
    shown = invoke("verify", "good")
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert shown.stderr == "good is what it was: every file and every golden output agrees\n"


@pytest.mark.parametrize("flag", ["--json", "--quiet"])
def test_verify_of_a_bad_bundle_exits_with_1(invoke, asked, flag):
    result = invoke("verify", "bad", flag)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: bad is not what it was: a.onnx: is [r, in], and 1 more\n"
        "hint: export the bundle again, or copy it again from where it came\n"
    )
    if flag == "--json":
        assert json.loads(result.stdout) == {
            "ok": False,
            "findings": [{"path": "a.onnx", "problem": "is [r, in]"}, {"path": "b.onnx", "problem": "is missing"}],
        }


def test_inspect_of_a_base(invoke, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    result = invoke("inspect", tmp_path, "--json")
    assert json.loads(result.stdout) == {
        "base": {
            "name": tmp_path.name,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "weights": {"model.safetensors": 8},
        }
    }
    shown = invoke("inspect", tmp_path)
    assert shown.stdout == ""
    assert "LlamaForCausalLM" in shown.stderr


def test_inspect_of_a_folder_with_another_config(invoke, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {tmp_path / 'config.json'} names no model_type\nhint: give a folder that transformers can load\n"
    )
