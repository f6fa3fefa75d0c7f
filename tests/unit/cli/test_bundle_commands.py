"""add, remove, verify and inspect: what they ask of the library and what they show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

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


def test_inspect_of_an_adapter_tells_its_share_of_the_base(invoke, tmp_path, root):
    adapter = root / "recipes" / "adapters" / "digits"
    save_file({"a": np.zeros((1000, 500)), "b": np.zeros(7, np.float16)}, tmp_path / "model.safetensors")
    (found,) = json.loads(invoke("inspect", adapter, "--base", tmp_path, "--json").stdout)["adapters"]
    assert found["share_of_base"] == round(found["parameters"] / 500007, 6)
    (alone,) = json.loads(invoke("inspect", adapter, "--json").stdout)["adapters"]
    assert alone["share_of_base"] is None


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("model.gguf", b"GGUX0000", "is no readable model: it does not begin with GGUF"),
        ("model.safetensors", b"12", "is no readable model: "),
        ("x", None, "holds no safetensors file"),
    ],
)
def test_inspect_with_a_base_that_cannot_be_read(invoke, tmp_path, root, name, data, problem):
    base = tmp_path / name
    if data is not None:
        base.write_bytes(data)
    result = invoke("inspect", root / "recipes" / "adapters" / "digits", "--base", base)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {base} {problem}")
