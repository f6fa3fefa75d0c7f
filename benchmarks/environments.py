"""One virtual environment per engine, made once: what `PACKAGES` and `SOURCE` of an engine's file ask for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


class InstallError(Exception):
    """What pip said when it failed."""


def ready_python(engine: ModuleType, name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """Return the Python of an engine's environment in `folder`, which is made or completed if it has to be.

    Raises:
        InstallError: with the end of what pip said.
    """
    source = getattr(engine, "SOURCE", None)
    if not engine.PACKAGES and source is None:
        return Path(sys.executable)
    environment = folder / name
    python, stamp = environment / "bin" / "python", environment / "benchmark-packages"
    wanted = repr((engine.PACKAGES, source, getattr(engine, "BUILD", None)))
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    say(f"installing {engine.LABEL} in {environment}")
    if not python.exists():
        venv.create(environment, with_pip=True)
    for packages in engine.PACKAGES:
        _pip(python, ["install", "-q", *packages])
    if source is not None:
        say(f"building {source}: minutes")
        _install_from_source(python, source, environment / "source", getattr(engine, "BUILD", {}))
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _install_from_source(python: Path, requirement: str, folder: Path, build: dict[str, str]) -> None:
    """Build with the tools of the environment itself; the unpacked source stays in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    package = requirement.partition("==")[0]
    options = ["--no-deps", "--no-build-isolation"]
    _pip(python, ["download", "-q", *options, "--no-binary", package, "-d", str(folder), requirement])
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    (unpacked,) = folder.iterdir()
    path = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    _pip(python, ["install", "-q", *options, str(unpacked)], {**build, **path})


def _pip(python: Path, arguments: list[str], extra: dict[str, str] | None = None) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(extra or {})})
    if done.returncode:
        raise InstallError(f"pip {' '.join(arguments)}: {done.stderr.strip()[-1500:]}")
