"""Rules of the whole: imports go one way, importing is light, one word per setting, the public names."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from typing import Any

import grimp
import pytest
import typer.main

import edgeadapt
from edgeadapt import registry, settings
from edgeadapt.cli.app import app
from edgeadapt.cli.export import export
from edgeadapt.recipe import Recipe

HEAVY = ("torch", "transformers", "peft", "optimum", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy", "gguf")


def test_import_contracts_hold(root):
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "package", ["edgeadapt.adapters.kinds", "edgeadapt.quantize.schemes", "edgeadapt.profiling.transports"]
)
def test_kinds_know_nothing_of_each_other(package):
    """A kind may share private modules ("_name") of its package, never another kind."""
    graph = grimp.build_graph("edgeadapt")
    kinds = {f"{package}.{name}" for name in registry.names(package)}
    assert {kind: graph.find_modules_directly_imported_by(kind) & kinds for kind in kinds} == {
        kind: set() for kind in kinds
    }


def _loaded(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"import sys, json\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["export", "--help"],
        ["blend", "--help"],
        ["convert", "--help"],
        ["run", "--help"],
        ["list", "devices"],
        ["list", "recipes"],
    ],
)
def test_the_program_starts_light(arguments):
    code = f"sys.argv = ['edgeadapt', *{arguments}]; import edgeadapt.cli.app as app; app.main()"
    assert _loaded(code).intersection(HEAVY) == set()


def test_importing_the_package_is_light():
    loaded = _loaded("import edgeadapt")
    assert "edgeadapt" in loaded
    assert loaded.intersection((*HEAVY, "typer", "rich")) == set()


@pytest.mark.parametrize(
    "name", ["open_session", "open_bundle", "add_adapter", "verify_bundle", "profile", "read_adapters"]
)
def test_a_device_needs_no_torch(name):
    loaded = _loaded(f"import edgeadapt; edgeadapt.{name}")
    assert loaded.intersection(("torch", "transformers", "peft", "optimum", "onnx", "onnx_ir", "onnxscript")) == set()


def test_one_word_per_setting():
    """A recipe's key, the dataclass field, the keyword argument and the flag are the same word."""
    fields = [field.name for field in dataclasses.fields(Recipe)]
    command: Any = typer.main.get_command(app)
    parameters = {
        p.name: p for p in command.commands["export"].params if p.name not in {"recipe", "json", "quiet", "help"}
    }
    assert list(parameters) == fields
    assert [name for name in inspect.signature(export).parameters if name in fields] == fields
    for name, parameter in parameters.items():
        if parameter.param_type_name == "argument":
            assert parameter.metavar == name.removesuffix("s").upper() + "..."
        else:
            word = name.removesuffix("s") if parameter.multiple else name  # a repeated flag names one of them
            assert parameter.opts[0] == "--" + word.replace("_", "-")
    for recipe in settings.names("recipes"):
        assert set(settings.read(settings.find("recipes", recipe))) <= set(fields)


def test_the_public_names():
    assert sorted(edgeadapt.__all__) == [
        "Device",
        "EdgeAdaptError",
        "Recipe",
        "__version__",
        "add_adapter",
        "base_from_module",
        "convert_adapter",
        "export_bundle",
        "load_base_model",
        "open_bundle",
        "open_session",
        "profile",
        "read_adapters",
        "read_device",
        "read_recipe",
        "remove_adapter",
        "stamp_base",
        "verify_bundle",
    ]
    for name in edgeadapt.__all__:
        value = getattr(edgeadapt, name)
        assert value.__doc__, name
    assert dir(edgeadapt) == sorted(edgeadapt.__all__)
    with pytest.raises(AttributeError, match="module 'edgeadapt' has no attribute 'oops'"):
        _ = edgeadapt.oops
