"""What `edgeadapt profile` says of one bundle after another on every runtime and transport of this machine.

    python benchmarks/profiler.py BUNDLE...              with nothing else running
    python benchmarks/profiler.py BUNDLE... --ways web,node      these anew, the others as they were
    python benchmarks/profiler.py BUNDLE... --models FOLDER      converted models are kept there: convert, then measure

Each row is one call of the command. The first way is called five times, in turns with a program that runs the same
model without the profiler: how far p50 moves from call to call, and what measuring adds. ssh goes to a real server on
this machine's loopback, adb through the real client to a double of a device (`tests/transports/`): their figures show
the road, not a device. Runtimes with a Python of their own are found as the command finds them
(`EDGEADAPT_LITERT_PYTHON`, ...). Writes benchmarks/results/profiler.json and docs/benchmarks/profiler.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from figures import table
from host import describe_host

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "profiler.json", ROOT / "docs" / "benchmarks" / "profiler.md"
CALLS = 5
WORK = {"prompt-tokens": 128, "new-tokens": 64, "repeats": 10}
RUNS = 10
"""Single passes for each repeat."""
WAYS: dict[str, tuple[str, ...]] = {
    "cpu": ("--device", "cpu"),
    "onnxruntime": ("--device", "cpu", "--runtime", "onnxruntime"),
    "torch": ("--device", "cpu", "--runtime", "torch"),
    "ort-mobile": ("--device", "cpu", "--runtime", "ort-mobile"),
    "openvino": ("--device", "cpu", "--runtime", "openvino"),
    "litert": ("--device", "cpu", "--runtime", "litert"),
    "executorch": ("--device", "cpu", "--runtime", "executorch"),
    "node": ("--device", "node"),
    "web": ("--device", "browser"),
    "ssh": (),
    "adb": (),
    "arm64-emulated": ("--device", "arm64-emulated"),
}
CONVERTED = ("ort-mobile", "openvino", "litert", "executorch")


def main() -> None:
    """Measure, write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {','.join(WAYS)}")
    parser.add_argument("--models", type=Path, help="a folder for converted models")
    parser.add_argument("--page", action="store_true", help="write the page again, measure nothing")
    args = parser.parse_args()
    if not args.page:
        found = {path.name: _bundle(path, args.ways.split(","), args.models) for path in args.bundles}
        result = {
            "schema": "edgeadapt.benchmark/1",
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "host": describe_host(),
            "bundles": _former() | found,
        }
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


def _former() -> dict[str, Any]:
    """Return what was measured before on this processor."""
    if not RESULTS.exists():
        return {}
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    same: dict[str, Any] = found["bundles"] if found["host"]["cpu"] == describe_host()["cpu"] else {}
    return same


def _bundle(path: Path, ways: Sequence[str], models: Path | None) -> dict[str, Any]:
    found = _former().get(path.name, {"ways": {}})
    if "cpu" in ways:
        found["ways"]["cpu"], found["calls"], found["bare_p50_s"] = _turns(path)
    for way in ways:
        if way != "cpu":
            print(f"{path.name}: {way}", file=sys.stderr)
            with _reached(way) as arguments:
                kept = () if models is None or way not in CONVERTED else ("--models", f"{models}/{path.name}-{way}")
                found["ways"][way] = _profile(path, (*arguments, *kept))
    found["ways"] = {way: found["ways"][way] for way in WAYS if way in found["ways"]}
    return found


def _turns(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[float]]:
    """Return a call, all calls, and the p50s of the bare program, which runs before each call and after the last."""
    steady, bare = [], [_bare(path)]
    for number in range(CALLS):
        print(f"{path.name}: call {number + 1} of {CALLS}", file=sys.stderr)
        steady.append(_profile(path, WAYS["cpu"]))
        bare.append(_bare(path))
    calls = [{key: call.get(key) for key in ("latency_p50_s", "noisy")} for call in steady]
    return steady[0], calls, bare


def _profile(path: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Call the command; return the figures, or its error."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        command = [sys.executable, "-m", "edgeadapt", "profile", str(path.resolve()), "--quiet", "-o", str(file)]
        numbers = [part for key, value in WORK.items() for part in (f"--{key}", str(value))]
        done = subprocess.run([*command, *arguments, *numbers], capture_output=True, text=True, check=False, cwd=ROOT)
        if not file.exists():
            return {"error": done.stderr.strip()}
        found = json.loads(file.read_text(encoding="utf-8"))
    return _figures(found) | {"status": done.returncode}


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    memory, tax, swap = (found[part] or {} for part in ("memory", "adapter_tax", "swap"))
    return {
        "runtime": found["runtime"],
        "version": found["runtime_version"],
        "threads": found["threads"],
        "latency_p50_s": found["latency_p50_s"],
        "latency_p95_s": found["latency_p95_s"],
        "ttft_s": found["prefills"][0]["ttft_s"] if found["prefills"] else None,
        "load_time_s": found["load_time_s"],
        "tax_ratio": tax.get("ratio"),
        "swap_resident_s": swap.get("resident_s"),
        "peak_resident_bytes": memory.get("peak_resident_bytes"),
        "model_bytes": found["sizes"]["model_bytes"],
        "relative_error": max((check["relative_error"] for check in found["checks"]), default=None),
        "same_top1": all(check["same_top1"] for check in found["checks"] if check["same_top1"] is not None),
        "noisy": found["noisy"],
        "noise": found["noise"],
        "notes": found["notes"],
        "failures": found["failures"],
    }


def _bare(path: Path) -> float:
    """Return the median seconds of a token after the prompt, or of a pass, in a process without the profiler."""
    command = [sys.executable, __file__.replace("profiler.py", "bare_loop.py"), str(path.resolve())]
    numbers = [str(WORK["prompt-tokens"]), str(WORK["new-tokens"]), str(WORK["repeats"]), str(RUNS)]
    done = subprocess.run([*command, *numbers], capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout)


@contextmanager
def _reached(way: str) -> Iterator[tuple[str, ...]]:
    """Give the arguments of a way, with the server that it needs."""
    if way not in ("ssh", "adb"):
        yield WAYS[way]
        return
    with tempfile.TemporaryDirectory() as folder, (_ssh if way == "ssh" else _adb)(Path(folder)) as address:
        file = Path(folder) / f"{way}.toml"
        file.write_text(
            f'title = "{way} on this machine"\nprovider = "cpu"\nruntime = "onnxruntime"\ntransport = "{way}"\n'
            f'address = "{address}"\ninterpreter = "{sys.executable}"\n',
            encoding="utf-8",
        )
        yield ("--device", str(file))


@contextmanager
def _ssh(folder: Path) -> Iterator[str]:
    from tests.transports.sshd import Sshd

    server = Sshd(folder / "sshd")
    os.environ["EDGEADAPT_SSH_CONFIG"] = str(server.client_config)
    try:
        yield "device"
    finally:
        server.stop()


@contextmanager
def _adb(folder: Path) -> Iterator[str]:
    from tests.transports.mini_adbd import Adbd
    from tests.transports.sshd import free_port

    home = os.environ["HOME"]
    os.environ |= {"HOME": str(folder), "ANDROID_ADB_SERVER_PORT": str(free_port())}
    device = Adbd({"PATH": os.environ["PATH"], "TMPDIR": str(folder)})
    try:
        yield device.address
    finally:
        device.stop()
        subprocess.run([str(shutil.which("adb")), "kill-server"], check=False, capture_output=True)
        os.environ["HOME"] = home


def page(result: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    host = result["host"]
    parts = [
        f"""# What `edgeadapt profile` measures, runtime by runtime

Generated from `benchmarks/results/profiler.json` by `python benchmarks/profiler.py` on {result["date"]}: {host["cpu"]},
{host["cores"]} cores ({", ".join(host["instruction_sets"])}), no GPU. Each row is one call of the command with a prompt
of {WORK["prompt-tokens"]} tokens, {WORK["new-tokens"]} new ones, {WORK["repeats"]} times. *gap*: the largest difference
from the bundle's goldens, with base and adapters, where the goldens' largest value is 1; *top-1*: the same likeliest
answers. ssh and adb reach this machine itself, adb a double of a device: they show the road. On the emulated processor
only answers count. *noisy*: other work disturbed all tries."""
    ]
    for name, found in result["bundles"].items():
        rows = [_row(way, each) for way, each in found["ways"].items()]
        parts += [f"## {name}", table([row for row in rows if row is not None]), _steadiness(found)]
        failed = [f"- **{way}**: {each['error']}" for way, each in found["ways"].items() if "error" in each]
        failed += [
            f"- **{way}**: {failure}" for way, each in found["ways"].items() for failure in each.get("failures", ())
        ]
        parts += ["What failed:\n\n" + "\n".join(failed)] if failed else []
    return "\n\n".join(parts) + "\n"


def _row(way: str, found: Mapping[str, Any]) -> dict[str, str] | None:
    if "error" in found:
        return None
    return {
        "way": way,
        "runtime": f"{found['runtime']} {found['version']}",
        "threads": str(found["threads"]),
        "p50 ms": _scaled(found["latency_p50_s"], 1e3),
        "p95 ms": _scaled(found["latency_p95_s"], 1e3),
        "first token ms": _scaled(found["ttft_s"], 1e3),
        "load s": _scaled(found["load_time_s"], 1),
        "adapter's cost": "–" if found["tax_ratio"] is None else f"{found['tax_ratio'] - 1:+.0%}",
        "swap ms": _scaled(found["swap_resident_s"], 1e3),
        "peak MB": _scaled(found["peak_resident_bytes"], 1e-6),
        "gap": "–" if found["relative_error"] is None else f"{found['relative_error']:.2g}",
        "top-1": "same" if found["same_top1"] else "**other**",
        "": "noisy" if found["noisy"] else "",
    }


def _scaled(value: float | None, factor: float) -> str:
    return "–" if value is None else f"{value * factor:.3g}"


def _steadiness(found: Mapping[str, Any]) -> str:
    p50s = [call["latency_p50_s"] for call in found["calls"]]
    ratios = [
        call["latency_p50_s"] / mean(found["bare_p50_s"][number : number + 2])
        for number, call in enumerate(found["calls"])
    ]
    shown = ", ".join(f"{value * 1e3:.3g}" for value in p50s)
    noisy = sum(call["noisy"] for call in found["calls"])
    return (
        f"**From call to call**: p50 of {len(p50s)} calls on `cpu` is {shown} ms: from the median at most "
        f"{max(abs(value / median(p50s) - 1) for value in p50s):.1%}, {noisy} of them "
        f"noisy.\n\n**What the profiler adds**: a median token or pass takes {median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}) times as long as in a program without it, which ran between the "
        f"{len(ratios)} calls."
    )


if __name__ == "__main__":
    main()
