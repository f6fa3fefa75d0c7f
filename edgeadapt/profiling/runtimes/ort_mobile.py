"""ONNX Runtime as phones have it: graphs in its own .ort format, which a build of the needed operators alone reads."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.runtimes import onnxruntime
from edgeadapt.profiling.runtimes.onnxruntime import graphs_of

ENGINE = "onnxruntime"
INSTALL = onnxruntime.INSTALL

CONFIG = "required_operators_and_types.config"
USABILITY = "usability.txt"
_REPORTS = "reports"
_TOOLS = "onnxruntime.tools"
_TYPES = re.compile(r"\{(?:[^{}]|\{[^{}]*\})*\}")
_VERDICT = re.compile(r"Model should perform well with (.+?) (as is|if modified[^:]*): (\w+)")


def require(device: Device) -> None:
    """Check that the device is a CPU and that graphs can be converted here.

    Raises:
        ProfileError: saying what is missing.
    """
    if device.provider != "cpu":
        raise ProfileError(
            f"graphs in .ort format are measured on the CPU, not on {device.provider!r}",
            hint="choose a device with provider cpu",
        )
    onnxruntime.require(device)
    for package in ("onnx", "flatbuffers"):
        if find_spec(package) is None:
            raise ProfileError(
                f"{package} is not installed, which converts graphs to .ort format here",
                hint="pip install 'edgeadapt[export]'",
            )


def made_for(device: Device, shapes: Shapes) -> dict[str, Any]:  # noqa: ARG001 - any shape is taken
    """Return what the graphs depend on: options of their conversion."""
    return {"conversion": list(_options(device))}


def prepare(bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:  # noqa: ARG001 - any shape is taken
    """Convert the bundle's graphs; each file holds all its weights, since the format knows none beside it.

    What a build of ONNX Runtime for these graphs alone has to know is in `folder/reports`: the operators and types, and
    what ONNX Runtime says of each accelerator of phones.

    Raises:
        ProfileError: if a graph cannot be converted.
    """
    files: dict[str, str] = {}
    reports = folder / _REPORTS
    with tempfile.TemporaryDirectory(prefix="edgeadapt-", dir=folder) as name:
        source = Path(name)
        graphs = graphs_of(bundle, source)
        _run("convert_onnx_models_to_ort", *_options(device), "--output_dir", str(reports), str(source / "model"))
        (folder / "model").mkdir()
        for form, graph in graphs.items():
            files[form] = str(Path(graph).with_suffix(".ort"))
            (reports / Path(files[form]).name).rename(folder / files[form])
        said = _run("check_onnx_model_mobile_usability", str(source / graphs["plain"]))
    (reports / USABILITY).write_text(said, encoding="utf-8")
    needed = needed_of((reports / CONFIG).read_text(encoding="utf-8"))
    options = {"provider": device.provider, "threads": device.threads}
    return Models(files, options, notes=(verdict_of(said), needed, *_size_note(files)))


def _options(device: Device) -> tuple[str, ...]:
    machine = device.machine or platform.machine()
    target = ("--target_platform", "arm") if machine.startswith(("arm", "aarch64")) else ()
    return ("--optimization_style", "Fixed", "--enable_type_reduction", *target)


def needed_of(config: str) -> str:
    """Return in one line which operators a build needs, from lines "domain;opset;Operator{types},..." of `CONFIG`."""
    found: dict[str, set[str]] = {}
    for line in config.splitlines():
        if not line.startswith("#") and line.count(";") >= 2:
            domain, _, operators = line.split(";", 2)
            found.setdefault(domain, set()).update(_TYPES.sub("", operators).split(","))
    told = [f"{domain} {', '.join(sorted(names))}" for domain, names in sorted(found.items())]
    return "operators that a build of ONNX Runtime needs for it: " + "; ".join(told)


def verdict_of(said: str) -> str:
    """Return in one line what the usability check said of each accelerator.

    Raises:
        ProfileError: if it said nothing of any.
    """
    found = _VERDICT.findall(said)
    if not found:
        raise ProfileError(
            "ONNX Runtime's mobile usability check gave no verdict", hint="please report this, with its version"
        )
    told = [f"{name} {how}: {answer.lower()}" for name, how, answer in found]
    return "good on a phone's accelerators, by ONNX Runtime's own check? " + "; ".join(told)


def _size_note(files: dict[str, str]) -> tuple[str, ...]:
    if len(files) == 1:
        return ()
    return (".ort files hold their weights: the graph with and the one without adapters' inputs count them twice",)


def _run(tool: str, *arguments: str) -> str:
    """Run one of ONNX Runtime's tools and return what it said.

    Raises:
        ProfileError: with its last words.
    """
    command = [sys.executable, "-m", f"{_TOOLS}.{tool}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        last = [line for line in said.strip().splitlines() if "Initializer" not in line][-3:]
        raise ProfileError(
            f"ONNX Runtime's {tool} failed: " + " | ".join(last),
            hint="check the bundle with `edgeadapt verify`; measure its ONNX graphs with --runtime onnxruntime",
        )
    return said
