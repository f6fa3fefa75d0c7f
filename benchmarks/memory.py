"""What sessions cost in memory: 1, 2 and 4 of them, in one process and in several, alone and sharing weights.

    python benchmarks/memory.py NAME=BUNDLE... -o benchmarks/results/memory.json

Each session opens the plain graph, writes eight tokens, swaps an adapter in (which opens the slots graph), and writes
eight more. Then the proportional set size of all processes together is read (Linux; a page that n processes share
counts as 1/n in each), while all are still there. With `share_weights` the cache is filled beforehand, in a process
that is gone when the measurement begins.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COUNTS = (1, 2, 4)
PROMPT = [5, 6, 7, 8]
TOKENS = 8
THREADS = 2
_KEYS = ("Pss", "Pss_Anon", "Pss_File", "Rss")


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", metavar="NAME=BUNDLE")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(json.loads(arguments.child))
        return
    results = [measure(name, Path(path)) for name, path in (item.split("=", 1) for item in arguments.bundles)]
    text = json.dumps({"unit": "bytes", "threads": THREADS, "bundles": results}, indent=2) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    print(text)


def measure(name: str, bundle: Path) -> dict[str, Any]:
    """Return one bundle's figures."""
    rows = []
    for share in (False, True):
        if share:
            _together([_ask(bundle, share=True, sessions=1)])
        for count in COUNTS:
            rows.append(
                {"sessions": count, "processes": 1, "share_weights": share}
                | _together([_ask(bundle, share=share, sessions=count)])
            )
            if count > 1:
                rows.append(
                    {"sessions": count, "processes": count, "share_weights": share}
                    | _together([_ask(bundle, share=share, sessions=1)] * count)
                )
    steps = {"own": _first_steps(bundle, share=False), "shared": _first_steps(bundle, share=True)}
    sizes = {path.relative_to(bundle).as_posix(): path.stat().st_size for path in _large_files(bundle)}
    return {"name": name, "files": sizes, "rows": rows, "one_session": steps}


def _large_files(bundle: Path) -> list[Path]:
    return sorted([bundle / "graph" / "weights.bin", *bundle.glob("adapters/*/adapter.onnx_adapter")])


def _ask(bundle: Path, *, share: bool, sessions: int) -> dict[str, Any]:
    return {"bundle": str(bundle), "share": share, "sessions": sessions, "steps": False}


def _first_steps(bundle: Path, *, share: bool) -> list[dict[str, Any]]:
    return _together([{**_ask(bundle, share=share, sessions=1), "steps": True}])["steps"]


def _together(asked: list[dict[str, Any]]) -> dict[str, Any]:
    """Start a process for each, wait until all have their sessions, and read all their memory then."""
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(item)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )
        for item in asked
    ]  # fmt: skip
    try:
        answers = [json.loads(_line(child)) for child in children]
        memory = [_memory(child.pid) for child in children]
    finally:
        for child in children:
            child.communicate("done\n")
    total = {key.lower(): sum(item[key] for item in memory) for key in _KEYS}
    return total | ({"steps": answers[0]["steps"]} if asked[0]["steps"] else {})


def _line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise SystemExit(f"a session failed: exit status {child.wait()}")
    return line


def _memory(process: int | str) -> dict[str, int]:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    fields = {line.partition(":")[0]: line.partition(":")[2] for line in lines}
    return {key: 1024 * int(fields[key].split()[0]) for key in _KEYS}


def _child(asked: dict[str, Any]) -> None:
    """Open sessions and use them, say so, and stay until told to go."""
    steps: list[dict[str, Any]] = []

    def step(name: str, started: float) -> None:
        taken = {"what": name, "wall_s": time.perf_counter() - started}
        steps.append(taken | {key.lower(): value for key, value in _memory("self").items()})

    started = time.perf_counter()
    from edgeadapt.runtime import open_session

    step("import", started)
    sessions = []
    for _ in range(asked["sessions"]):
        started = time.perf_counter()
        session = open_session(asked["bundle"], threads=THREADS, share_weights=asked["share"])
        session.prepare()
        step("open the plain graph", started)
        sessions.append(session)
        started = time.perf_counter()
        session.complete(PROMPT, max_new_tokens=TOKENS, temperature=0)
        step("write 8 tokens", started)
        for name in session.adapters:
            started = time.perf_counter()
            session.use(name)
            step(f"use {name}", started)
            started = time.perf_counter()
            session.complete(PROMPT, max_new_tokens=TOKENS, temperature=0)
            step("write 8 tokens", started)
    print(json.dumps({"steps": steps}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
