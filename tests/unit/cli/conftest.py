from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from edgeadapt.bundle.manifest import (
    AdapterRecord,
    BaseModule,
    BaseRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    Slot,
)
from edgeadapt.cli.app import app

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Run the program in this process; stdout and stderr apart, bugs raised."""

    def run(*args: object) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False, prog_name="edgeadapt")

    return run


@pytest.fixture
def manifest() -> Manifest:
    """A small bundle's manifest."""
    module = BaseModule("layer.q", "linear", "Linear", (4, 4), 4, 4, has_bias=False, digest="00" * 32)
    return Manifest(
        schema="edgeadapt.bundle/1",
        name="tiny",
        task="text-generation",
        base=BaseRecord("tiny-base", None, "llama", None, "11" * 32, (module,)),
        graphs={
            "decoder": GraphRecord("graph/decoder.plain.onnx", "graph/decoder.slots.onnx", ("input_ids",), ("logits",))
        },
        slots=(Slot("layer.q", ("decoder",), "linear", 4, 4, {"a": "layer.q.lora_A", "b": "layer.q.lora_B"}),),
        parameters=(),
        adapter_dtype="float16",
        merged=None,
        adapters={"sql[r, in]": AdapterRecord("lora", 4, 32, 0.5, 1e-3, "stamp")},
        quantization={"scheme": "int8"},
        parity={"max_relative_error": 1.5e-6},
        quality=({"adapter": "sql[r, in]", "mean_kl": 0.0023, "top1": 0.98},),
        files={"graph/weights.bin": FileRecord(1000, "22" * 32, "weights"), "a": FileRecord(24, "33" * 32, "adapter")},
        runtime={"onnxruntime": ">=1.24.3"},
    )


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put functions in the place of a library module, so that a test sees what a command asks of it."""

    def put(module: str, **functions: Any) -> None:
        stand_in = ModuleType(module)
        for name, function in functions.items():
            setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, module, stand_in)

    return put


@pytest.fixture
def bundle(manifest: Manifest, tmp_path: Path) -> SimpleNamespace:
    """What `open_bundle` gives, as far as the command line looks at it."""
    return SimpleNamespace(
        path=tmp_path / "tiny.bundle",
        manifest=manifest,
        adapter_names=tuple(manifest.adapters),
        has_patch=lambda _name: False,
    )


def lines(text: str) -> Sequence[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]
