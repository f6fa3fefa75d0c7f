"""Tiny models, exported once and shared; the program in this process and in its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from edgeadapt.cli.app import app
from edgeadapt.export import export as export_module
from edgeadapt.export.graph import Graph
from edgeadapt.merging.fingerprint import stamp_base
from edgeadapt.merging.load import load_base_model
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe, read_recipe
from tests.e2e.tiny import ARCHITECTURES, build

Invoke = Callable[..., Result]
Exported = Callable[..., Path]


@dataclass(frozen=True)
class Tiny:
    """A base's folder, its task, and two adapters' folders."""

    base: Path
    adapters: tuple[Path, Path]
    task: str


@dataclass(frozen=True)
class Shipped:
    """A bundle that a shipped recipe made: its folder, `export --json`, and what people were told."""

    path: Path
    summary: Mapping[str, Any]
    told: str


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def invoke() -> Invoke:
    """Run the program in this process; stdout and stderr apart, bugs raised."""

    def run(*args: object) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False, prog_name="edgeadapt")

    return run


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the program in a process of its own, behind Python code that runs first; kill what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def run(*args: object, first: str = "", **environment: str) -> subprocess.Popen[str]:
        code = f"{first}\nfrom edgeadapt.cli.app import main\nmain()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *(str(arg) for arg in args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Return a function from an architecture's name to its base and stamped adapters, made once; not to be changed."""
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            (architecture,) = (item for item in ARCHITECTURES if item.name == name)
            base, (one, two) = build(architecture, tmp_path_factory.mktemp(name))
            for adapter in (one, two):
                stamp_base(adapter, load_base_model(base, task=architecture.task))
            made[name] = Tiny(base, (one, two), architecture.task)
        return made[name]

    return get


@pytest.fixture(scope="session")
def _traces() -> dict[Any, Graph]:
    return {}


def _identity(base: Any, replaced: tuple[str, ...]) -> Any:
    digest = hashlib.sha256(repr(base.config).encode())
    for name, tensor in sorted(base.module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return base.task, base.max_length, tuple(sorted(replaced)), digest.hexdigest()


def _copy(graph: Graph) -> Graph:
    return replace(graph, models={role: model.clone() for role, model in graph.models.items()})


@pytest.fixture(scope="session")
def tracing_once(_traces: dict[Any, Graph]) -> Callable[[], Any]:
    """Return a context in which torch traces each base once: three quarters of a tiny export's time."""
    trace = export_module.export_graph

    def traced(base: Any, *, replaced: Any = (), **options: Any) -> Graph:
        key = _identity(base, tuple(replaced))
        if key not in _traces:
            _traces[key] = trace(base, replaced=replaced, **options)
        return _copy(_traces[key])

    def context() -> Any:
        patch = pytest.MonkeyPatch()
        patch.setattr(export_module, "export_graph", traced)
        return _Undone(patch)

    return context


class _Undone:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        self._patch.undo()


@pytest.fixture
def traced_once(tracing_once: Callable[[], Any]) -> Iterator[None]:
    """Let torch trace a base only if no test before has."""
    with tracing_once():
        yield


@pytest.fixture(scope="session")
def exported(
    tiny: Callable[[str], Tiny], tracing_once: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """Return a function from an architecture and a recipe's fields to a bundle, made once; not to be changed."""
    made: dict[str, Path] = {}

    def get(name: str, **fields: Any) -> Path:
        key = f"{name} {sorted(fields.items())}"
        if key not in made:
            model = tiny(name)
            settings: Mapping[str, Any] = {
                "adapters": model.adapters,
                "base": str(model.base),
                "output": tmp_path_factory.mktemp("bundles") / f"{name}.bundle",
                "task": model.task,
                **fields,
            }
            with tracing_once():
                made[key] = export_bundle(Recipe(**settings)).path
        return made[key]

    return get


@pytest.fixture
def copied(exported: Exported, tmp_path: Path) -> Exported:
    """Like `exported`, but a copy of the test's own."""

    def get(name: str, **fields: Any) -> Path:
        return Path(shutil.copytree(exported(name, **fields), tmp_path / f"{name}.bundle"))

    return get


@pytest.fixture(scope="session")
def shipped(root: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Shipped]:
    """Return a function from a shipped recipe of a real model to its bundle, made once; not to be changed."""
    made: dict[str, Shipped] = {}

    def get(name: str) -> Shipped:
        if name not in made:
            # The recipe says where scripts/fetch-models puts the base; EDGEADAPT_MODELS may have moved all of them.
            base = models / Path(read_recipe(name).base).resolve().relative_to(root / "models")
            output = tmp_path_factory.mktemp("recipes") / f"{name}.bundle"
            done = subprocess.run(
                [sys.executable, "-m", "edgeadapt", "export", "--recipe", name, "--base", base, "-o", output, "--json"],
                capture_output=True,
                text=True,
                check=False,
                cwd=output.parent,  # a recipe's paths are its own, not the caller's
            )
            assert done.returncode == 0, done.stderr
            made[name] = Shipped(output, json.loads(done.stdout), done.stderr)
        return made[name]

    return get


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
