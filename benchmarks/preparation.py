"""What is measured, made once and kept: checkpoint, adapters, each engine's model files, reference logits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from random_adapter import write_random_adapter
from workload import REPOSITORY, Workload

HERE = Path(__file__).resolve().parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


class PrepareError(Exception):
    """What an engine said when it could not make its model."""


@dataclass(frozen=True)
class Material:
    """What every engine starts from: the base as its users have it, the same in float32, and PEFT's adapters."""

    base: Path
    checkpoint: Path
    adapters: dict[str, str]


def make_material(base: Path, work: Path, given: Path | None, say: Callable[[str], None]) -> Material:
    """The float32 checkpoint, two trained adapters of rank 16, and a random one of rank 8 on q and v."""
    checkpoint = work / "checkpoint"
    if not (checkpoint / "config.json").exists():
        say("float32 checkpoint")
        _atomically(checkpoint, lambda folder: _python("save_checkpoint.py", str(base), str(folder)))
    adapters = {}
    for task in ("sql", "json"):
        adapters[task] = given / task if given else work / "adapters" / task
        if not (adapters[task] / "adapter_config.json").exists():
            say(f"training the adapter {task}: about ten minutes, once")
            _atomically(adapters[task], partial(_train, task, base))
    adapters["qv8"] = work / "adapters" / "qv8"
    if not (adapters["qv8"] / "adapter_config.json").exists():
        write_random_adapter(adapters["qv8"], checkpoint, rank=8, modules=("q_proj", "v_proj"), base_name=BASE_NAME)
    return Material(base.resolve(), checkpoint, {name: str(path.resolve()) for name, path in adapters.items()})


def _train(task: str, base: Path, folder: Path) -> None:
    program = str(REPOSITORY / "recipes" / "training" / "train_chat.py")
    threads = str(os.cpu_count() or 1)
    _python(program, task, "--base", str(base), "--rank", "16", "--skip-base", "--threads", threads, "-o", str(folder))


def make_model(
    engine: str, module: ModuleType, configuration: str, *, python: Path, material: Material, work: Path, reuse: bool
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of an engine's model files and what making them cost; made again only if something changed.

    With `reuse` also what changed since is taken as it is; "stale" says so in what is returned.

    Raises:
        PrepareError: with what the engine said.
    """
    folder = work / f"{engine}-{configuration}"
    key = _key(engine, module, configuration, material)
    record = folder / "made.json"
    if record.exists():
        made: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if made["key"] == key or reuse:
            return folder, {**made, "stale": made["key"] != key}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    request = {
        "do": "prepare",
        "configuration": configuration,
        "base": str(material.base),
        "checkpoint": str(material.checkpoint),
        "adapters": material.adapters,
        "folder": str(folder),
    }
    answer, cost = _one_request(python, engine, request)
    if "error" in answer:
        shutil.rmtree(folder, ignore_errors=True)
        raise PrepareError(answer["error"])
    made = {"key": key, **cost, "said": answer}
    record.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return folder, {**made, "stale": False}


def make_reference(material: Material, workload: Workload, threads: int, work: Path) -> Path:
    """The folder with the float32 logits of torch and PEFT: ADAPTER-TEXT.npy, and greedy tokens in greedy.json."""
    folder = work / "reference"
    key = _digest([Path(path) / "adapter_model.safetensors" for path in material.adapters.values()], str(workload))
    if (folder / "key").exists() and (folder / "key").read_text(encoding="utf-8") == key:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    jobs = {name: material.adapters.get(name or "") for name in workload.held_out}
    (folder / "workload.json").write_text(
        json.dumps({"prompt": workload.prompt, "texts": {name or "": ids for name, ids in workload.held_out.items()}}),
        encoding="utf-8",
    )
    adapters = json.dumps({name: path for name, path in jobs.items() if name})
    _python("reference.py", str(material.checkpoint), adapters, str(folder), str(threads))
    (folder / "key").write_text(key, encoding="utf-8")
    return folder


def texts_of(adapter: str | None) -> tuple[str, ...]:
    """The held-out texts on which an adapter's logits are compared: prose, and its own task."""
    return ("",) if adapter is None else ("", adapter)


def _key(engine: str, module: ModuleType, configuration: str, material: Material) -> str:
    """Changes when the result would: the engine's packages and settings, edgeadapt's own code, or an adapter."""
    sources = sorted((REPOSITORY / "edgeadapt").rglob("*.py")) if engine == "edgeadapt" else [HERE / "genai_slots.py"]
    tensors = [Path(path) / "adapter_model.safetensors" for path in material.adapters.values()]
    text = repr((module.PACKAGES, getattr(module, "SOURCE", ""), module.CONFIGURATIONS[configuration]))
    return _digest([*sources, *tensors], text)


def _digest(files: Iterable[Path], text: str) -> str:
    found = hashlib.sha256(text.encode())
    for file in files:
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def measured_run(command: list[str], told: str = "") -> tuple[int, dict[str, float], str, str]:
    """Run a program to its end: exit status, what it cost, its output, its error output.

    The cost is wall seconds, CPU seconds of it and all that it started and waited for, and the peak memory of the
    largest of these processes.
    """
    # Nothing here is timed against a peer; torch's threads shall not spin while others work.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with tempfile.TemporaryFile("w+") as into, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        into.write(told)
        into.seek(0)
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=into, stdout=out, stderr=err, text=True, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        cost = {
            "wall_s": time.perf_counter() - started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * 1024,
        }
        for file in (out, err):
            file.seek(0)
        return process.returncode, cost, out.read(), err.read()


def _one_request(python: Path, engine: str, request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ask a child once; its answer and what it cost."""
    command = [str(python), str(HERE / "child.py"), str(HERE / "engines" / f"{engine}.py")]
    status, cost, out, err = measured_run(command, json.dumps(request) + "\n")
    answer = json.loads(out) if out else {"error": f"ended with {status}: {err.strip()[-1500:]}"}
    return answer, cost


def _python(program: str, *arguments: str) -> None:
    status, _, _, err = measured_run([sys.executable, str(HERE / program), *arguments])
    if status:
        raise PrepareError(f"{Path(program).name}: {err.strip()[-1500:]}")


def _atomically(target: Path, make: Callable[[Path], None]) -> None:
    unfinished = target.with_name(f"{target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    make(unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
