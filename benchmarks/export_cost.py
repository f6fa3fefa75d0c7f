"""What an export costs: CPU seconds, wall seconds and peak memory, by stage and in all.

    python benchmarks/export_cost.py NAME=BASE[+ADAPTER...] ... -o benchmarks/results/export_cost.json
    python benchmarks/export_cost.py Qwen2.5-0.5B Llama-3.2-1B --scheme int8      shapes with random weights

A shape of shapes.py is written once as a Hugging Face folder with a random LoRA of rank 16 on every linear. Each export
runs in a process of its own. Memory is the resident set (VmHWM, Linux), with the pages of mapped files in it, which the
system could drop; the high-water mark is set back when a stage begins. Cases that were measured before are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent


def main() -> None:
    """Measure every case and write the results after each."""
    args = _arguments()
    if args.child:
        _child(json.loads(args.child))
        return
    from host import describe_host

    rows = json.loads(args.output.read_text(encoding="utf-8"))["rows"] if args.output.exists() else []
    for name, base, adapters in (_case(text, args.work) for text in args.cases):
        for scheme in args.scheme:
            row = {"name": name, "scheme": scheme, "adapters": len(adapters)} | _measure(base, adapters, scheme, args)
            rows = [old for old in rows if (old["name"], old["scheme"]) != (name, scheme)] + [row]
            rows.sort(key=lambda row: (row["float32_bytes"], row["name"], row["scheme"]))
            result = {"unit": "bytes, seconds", "host": describe_host(), "threads": args.threads, "rows": rows}
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            shown = {key: value for key, value in row.items() if key != "stages"}
            print(json.dumps(shown))


def _case(text: str, work: Path) -> tuple[str, Path, list[Path]]:
    """Return (name, base, adapters) of one argument."""
    name, _, paths = text.partition("=")
    if paths:
        base, *adapters = paths.split("+")
        return name, Path(base).resolve(), [Path(adapter).resolve() for adapter in adapters]
    from shapes import SHAPES, write_model

    shape = next((shape for shape in SHAPES if shape.name == name), None)
    if shape is None:
        raise SystemExit(f"{name} is no shape: {', '.join(shape.name for shape in SHAPES)}")
    folder, adapter = write_model(shape, work)
    return f"{name} (random)", folder, [adapter]


def _measure(base: Path, adapters: list[Path], scheme: str, args: argparse.Namespace) -> dict[str, Any]:
    output = args.work / "export_cost.bundle"
    asked = {"base": str(base), "adapters": [str(path) for path in adapters], "scheme": scheme, "output": str(output)}
    command = [sys.executable, str(HERE / "export_cost.py"), "--child", json.dumps(asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(output)
    return {"wall_s": round(time.monotonic() - began, 1), **told}


@dataclass
class _Stages:
    """A progress that notes what each stage takes; stages inside of others count to these."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    depth: int = 0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note one stage, and before it whatever came since the last one."""
        if self.depth == 0:
            self._end("between", self.began)
            self._begin()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self._end(name, self.began)
                self._begin()

    def __post_init__(self) -> None:
        self.began = (time.monotonic() - _age_s(), 0.0)

    def _begin(self) -> None:
        self.began = (time.monotonic(), time.process_time())
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def _end(self, name: str, began: tuple[float, float]) -> None:
        memory = _memory()
        wall, cpu = time.monotonic() - began[0], time.process_time() - began[1]
        self.rows.append({"stage": name, "wall_s": round(wall, 2), "cpu_s": round(cpu, 2), **memory})

    def finish(self) -> list[dict[str, Any]]:
        """Return all stages; short gaps without a name are left out of the list, not out of the peak."""
        self._end("between", self.began)
        return self.rows

    def advance(self, done: int, total: int) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Show what the export says."""
        print(message, file=sys.stderr)


def _age_s() -> float:
    """Return how long this process has been there."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def _memory() -> dict[str, int]:
    names = {"VmHWM": "peak_bytes", "RssAnon": "anonymous_bytes", "RssFile": "file_bytes"}
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {
        key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines) if key in names
    }
    return {label: found[key] for key, label in names.items()}


def _child(asked: dict[str, Any]) -> None:
    stages = _Stages()
    from edgeadapt.pipeline import export_bundle
    from edgeadapt.recipe import Recipe

    adapters = tuple(Path(path) for path in asked["adapters"])
    recipe = Recipe(adapters, asked["base"], Path(asked["output"]), quantize=asked["scheme"], force=True)
    bundle = export_bundle(recipe, stages)
    rows = stages.finish()
    sizes = {module.digest: 4 * math.prod(module.weight_shape) for module in bundle.manifest.base.modules}
    base_bytes = sum(sizes.values())
    peak = max(row["peak_bytes"] for row in rows)
    told = {
        "cpu_s": round(time.process_time(), 1),
        "peak_bytes": peak,
        "float32_bytes": base_bytes,
        "peak_beyond_600_mb_by_float32": round((peak - 600e6) / base_bytes, 2),
        "parity": bundle.manifest.parity["max_relative_error"],
        "stages": [row for row in rows if row["stage"] != "between" or row["cpu_s"] >= 0.5],
    }
    print(json.dumps(told))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--scheme", nargs="+", default=["int8", "int4"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "shapes", help="models and bundles go here")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "export_cost.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
