"""What the product has to show, measured: run one subcommand, get its figures as JSON and as a table.

    python benchmarks/must_show.py architectures --date 2026-01-31
    python benchmarks/must_show.py smollm2 --date 2026-01-31 --base BASE.gguf --adapter sql=DIR --adapter json=DIR
    python benchmarks/must_show.py minilm --date 2026-01-31 --base FOLDER
    python benchmarks/must_show.py cost --date 2026-01-31 --bundle BUNDLE --adapter DIR

The JSON goes to benchmarks/results/, the table of `architectures` to docs/benchmarks/ too. Bundles stay in --work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from architecture_table import architectures, write_page

# Read when torch is first imported: its threads sleep while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
Row = dict[str, Any]

PROMPTS = {
    "sql": "Table books(title, author, genre, year, pages). How many books were published after 2010?",
    "json": "Extract name, city, quantity as JSON: Please ship 12 backpacks to Priya Nair in Prague.",
    "chat": "Why is the sky blue?",
}
STEPS = 128
HELP_RUNS = 10
COUNT_MODULES = """
import json, sys
from edgeadapt.cli.app import main
status = 0
try:
    main()
except SystemExit as end:
    status = end.code
heavy = sorted({"torch", "transformers", "peft", "onnx", "onnxscript"} & set(sys.modules))
print(json.dumps({"status": status, "modules": len(sys.modules), "heavy": heavy}), file=sys.stderr)
"""


def main() -> None:
    """Measure what the subcommand says, write it, print it."""
    args = _arguments()
    started = time.perf_counter()
    figures, tables = args.measure(args)
    result = {
        "schema": "edgeadapt.benchmark/1",
        "benchmark": args.command,
        "date": args.date,
        "host": _host(),
        "load_average": os.getloadavg()[0],
        "seconds": round(time.perf_counter() - started, 1),
        **figures,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{args.command}.json"
    path.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")
    text = "\n".join(f"**{title}**\n\n{_markdown(rows)}\n" for title, rows in tables.items())
    print(text)
    if args.command == "architectures":
        write_page(args.date, _markdown(tables["Architectures"]))


# --- SmolLM2 -------------------------------------------------------------------------------------------------------


def smollm2(args: argparse.Namespace) -> tuple[Row, dict[str, list[Row]]]:
    """Two adapters on SmolLM2: exports of every scheme as programs, then their answers beside peft's."""
    adapters = _named_paths(args.adapter)
    exports = {scheme: _export(args, adapters, scheme) for scheme in args.scheme}
    parity = exports["none"]["summary"]["parity"] if "none" in exports else None
    agreements = _agreements(args, adapters, [scheme for scheme in args.agree if scheme in exports])
    costs = [
        {
            "scheme": scheme,
            "export CPU s": f"{made['cpu_s']:.0f}",
            "export s": f"{made['wall_s']:.0f}",
            "peak memory MB": f"{made['peak_rss_bytes'] / 1e6:.0f}",
            "bundle MB": f"{made['summary']['bytes']['total'] / 1e6:.1f}",
            "weights MB": f"{made['summary']['bytes']['weights'] / 1e6:.1f}",
        }
        for scheme, made in exports.items()
    ]
    quality = [
        {"scheme": scheme, "adapter": row["adapter"] or "(base)"}
        | {key: f"{row[key]:.5f}" for key in ("mean_kl", "max_kl", "top1")}
        | {"positions": row["positions"]}
        for scheme, made in exports.items()
        for row in made["summary"]["quality"]
    ]
    modes = [
        {"adapter": row["adapter"] or "(base)", "mode": row["mode"], "error": f"{row['max_relative_error']:.1e}"}
        for row in (parity or {"rows": []})["rows"]
    ]
    tokens = [
        {
            "scheme": row["scheme"],
            "adapter": row["adapter"] or "(base)",
            "prompt": row["prompt"],
            "answer the same": f"{'yes' if row['same_answer'] else 'no'} ({row['answer']} tokens)",
            f"same of {STEPS}, fed PEFT's": row["same_when_fed"],
            f"first of {STEPS} that agree, fed its own": row["same_freely"],
        }
        for row in agreements
    ]
    ranks = {name: record["rank"] for name, record in next(iter(exports.values()))["summary"]["adapters"].items()}
    tables = {
        "Parity in float32 (largest relative error against PEFT)": modes,
        "Quality": quality,
        f"Greedy tokens ({STEPS} steps)": tokens,
        "Exports": costs,
    }
    return {"ranks": ranks, "parity": parity, "exports": exports, "agreements": agreements}, tables


def _export(args: argparse.Namespace, adapters: dict[str, Path], scheme: str) -> Row:
    """Export in a process of its own; its CPU seconds and peak memory as the system counts them."""
    output = args.work / f"smollm2-{scheme}.bundle"
    flags = [part for name in adapters for part in ("--name", name)]
    command = [sys.executable, "-m", "edgeadapt", "export", *map(str, adapters.values()), *flags, "--base", args.base]
    command += ["-o", str(output), "--quantize", scheme, "--force", "--json", "--quiet"]
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            sys.exit(f"the export to {scheme} failed")
        wall_s = time.perf_counter() - started
        out.seek(0)
        summary = json.load(out)
    del summary["path"]
    made = {"wall_s": wall_s, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_rss_bytes": usage.ru_maxrss * 1024}
    print(f"export {scheme}: {made['cpu_s']:.0f} CPU s", file=sys.stderr)
    return {**made, "summary": summary}


def _agreements(args: argparse.Namespace, adapters: dict[str, Path], schemes: Sequence[str]) -> list[Row]:
    import torch
    from against_peft import Peft, agreement

    from edgeadapt import load_base_model, open_session
    from edgeadapt.runtime.generate import prompt_ids

    torch.set_num_threads(args.threads)
    peft = Peft(load_base_model(args.base).module, adapters)
    rows: list[Row] = []
    expected: dict[tuple[str | None, str], list[int]] = {}
    for scheme in schemes:
        with open_session(args.work / f"smollm2-{scheme}.bundle", threads=args.threads, keep_graphs=False) as session:
            for adapter in (None, *adapters):
                for prompt, text in PROMPTS.items():
                    ids = prompt_ids(session.text, text, None)
                    if (adapter, prompt) not in expected:
                        expected[adapter, prompt] = peft.greedy(adapter, ids, STEPS)
                    found = agreement(session, adapter, ids, expected[adapter, prompt])
                    rows.append(
                        {"scheme": scheme, "adapter": adapter, "prompt": prompt, **asdict(found)}
                        | {"same_answer": found.same_answer}
                    )
                    print(rows[-1], file=sys.stderr)
    return rows


# --- MiniLM --------------------------------------------------------------------------------------------------------


def minilm(args: argparse.Namespace) -> tuple[Row, dict[str, list[Row]]]:
    """Two classifiers with heads of different size in one bundle: accuracy in torch, ONNX float32 and int8."""
    import torch
    from against_peft import Peft, labels, share_right
    from transformers import AutoTokenizer

    from edgeadapt import Recipe, export_bundle, load_base_model, open_session

    torch.set_num_threads(args.threads)
    names = ("debian-section", "debian-kind")
    adapters = {name: REPOSITORY / "recipes" / "adapters" / name for name in names}
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    tests = {name: _labelled(name) for name in names}
    for name, (texts, wanted) in tests.items():
        classes = json.loads((adapters[name] / "labels.json").read_text(encoding="utf-8"))["labels"]
        module = load_base_model(args.base, task="text-classification", num_labels=len(classes)).module
        answers = Peft(module, {name: adapters[name]}).classes(name, AutoTokenizer.from_pretrained(args.base), texts)
        found[name]["torch (PEFT)"] = share_right([classes[i] for i in answers], wanted)
    for scheme in ("none", "int8"):
        output = args.work / f"minilm-{scheme}.bundle"
        recipe = Recipe(tuple(adapters.values()), args.base, output, quantize=scheme, force=True)
        with open_session(export_bundle(recipe), threads=args.threads) as session:
            for name, (texts, wanted) in tests.items():
                column = "ONNX float32" if scheme == "none" else f"ONNX {scheme}"
                found[name][column] = share_right(labels(session, name, texts), wanted)
    rows = [
        {"adapter": name, "test texts": len(tests[name][0])} | {key: f"{value:.2%}" for key, value in row.items()}
        for name, row in found.items()
    ]
    return {"accuracy": found, "texts": {name: len(texts) for name, (texts, _) in tests.items()}}, {"Accuracy": rows}


def _labelled(name: str) -> tuple[list[str], list[str]]:
    lines = (REPOSITORY / "recipes" / "data" / f"{name}.test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["text"] for row in rows], [row["label"] for row in rows]


# --- what the program itself costs ---------------------------------------------------------------------------------


def cost(args: argparse.Namespace) -> tuple[Row, dict[str, list[Row]]]:
    """`edgeadapt --help`, and `edgeadapt add` on a copy of a bundle."""
    import shutil

    runs = [_cli("--help") for _ in range(HELP_RUNS)]
    nothing = [_child([sys.executable, "-c", "pass"]) for _ in range(HELP_RUNS)]
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        copy = Path(shutil.copytree(args.bundle, Path(folder) / "copy.bundle"))
        adding = _cli("add", str(copy), str(args.adapter), "--name", "one-more", "--quiet")
    figures = {
        "help": {
            "wall_ms": median(run["wall_s"] for run in runs) * 1e3,
            "wall_ms_min": min(run["wall_s"] for run in runs) * 1e3,
            "cpu_ms": median(run["cpu_s"] for run in runs) * 1e3,
            "python_itself_wall_ms": median(run["wall_s"] for run in nothing) * 1e3,
            "modules": runs[0]["modules"],
            "heavy_modules": runs[0]["heavy"],
        },
        "add": {
            "bundle": args.bundle.name,
            "cpu_s": adding["cpu_s"],
            "wall_s": adding["wall_s"],
            "peak_rss_bytes": adding["peak_rss_bytes"],
            "modules": adding["modules"],
            "torch_imported": "torch" in adding["heavy"],
            "heavy_modules": adding["heavy"],
        },
    }
    helped = figures["help"]
    rows = [
        {
            "command": "edgeadapt --help",
            "wall": f"{helped['wall_ms']:.0f} ms, at best {helped['wall_ms_min']:.0f}",
            "CPU": f"{helped['cpu_ms']:.0f} ms",
            "modules": helped["modules"],
            "torch imported": "torch" in runs[0]["heavy"],
        },
        {
            "command": f"edgeadapt add {args.bundle.name}",
            "wall": f"{adding['wall_s']:.1f} s",
            "CPU": f"{adding['cpu_s']:.1f} s",
            "modules": adding["modules"],
            "torch imported": figures["add"]["torch_imported"],
        },
    ]
    return figures, {"What the program costs": rows}


def _cli(*arguments: str) -> Row:
    """Run the program and count its modules at the end."""
    run = _child([sys.executable, "-c", COUNT_MODULES, *arguments])
    counted = json.loads(run.pop("told").splitlines()[-1])
    if counted["status"]:
        sys.exit(f"edgeadapt {' '.join(arguments)} ended with {counted['status']}")
    return {**run, **counted}


def _child(command: list[str]) -> Row:
    with tempfile.TemporaryFile("w+") as told:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        return {
            "wall_s": wall_s,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_rss_bytes": usage.ru_maxrss * 1024,
            "told": told.read(),
        }


# --- shared --------------------------------------------------------------------------------------------------------


def _host() -> Row:
    from importlib.metadata import version

    from edgeadapt.profiling.device_side.system import host_facts

    versions = {name: version(name) for name in ("edgeadapt", "onnxruntime", "numpy", "torch", "transformers", "peft")}
    return {**host_facts(), "versions": versions}


def _named_paths(pairs: Sequence[str]) -> dict[str, Path]:
    return {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}


def _markdown(rows: Sequence[Row]) -> str:
    if not rows:
        return "(nothing)"
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for measure in (architectures, smollm2, minilm, cost):
        command = commands.add_parser(measure.__name__, help=measure.__doc__)
        command.set_defaults(measure=measure)
        command.add_argument("--date", required=True, help="of the measurement, for the record")
        command.add_argument("--work", type=Path, default=REPOSITORY / "build" / "must_show", help="bundles go here")
        command.add_argument("--threads", type=int, default=1)
    for name in ("smollm2", "minilm"):
        commands.choices[name].add_argument("--base", required=True)
    commands.choices["smollm2"].add_argument("--adapter", action="append", required=True, metavar="NAME=FOLDER")
    commands.choices["smollm2"].add_argument("--scheme", nargs="+", default=["none", "fp16", "int8", "int4"])
    commands.choices["smollm2"].add_argument("--agree", nargs="+", default=["none", "int8"], help="against peft's")
    commands.choices["cost"].add_argument("--bundle", type=Path, required=True)
    commands.choices["cost"].add_argument("--adapter", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
