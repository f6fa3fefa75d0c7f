"""The architecture table: what each supported architecture costs to export, and how exact the result is."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def architectures(args: argparse.Namespace) -> tuple[Row, dict[str, list[Row]]]:
    """Every architecture, tiny and random, two adapters of rank 4 and 2 saved by peft, exported in float32."""
    import torch

    sys.path.insert(0, str(REPOSITORY))
    from tests.e2e.tiny import ARCHITECTURES

    torch.set_num_threads(args.threads)
    rows = []
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_architecture(architecture, Path(folder)))
        print(f"{architecture.name}: {rows[-1]['export_s']:.1f} s", file=sys.stderr)
    return {"rows": rows}, {"Architectures": [_shown(row) for row in rows]}


def _shown(row: Row) -> Row:
    return {
        "architecture": row["architecture"],
        "task": row["task"],
        "export s (CPU s)": f"{row['export_s']:.1f} ({row['export_cpu_s']:.1f})",
        "parity base": f"{row['parity']['base']:.1e}",
        "parity adapters": ", ".join(f"{v:.1e}" for k, v in row["parity"].items() if k != "base"),
        "ways to run": len(row["modes"]),
        "sites kept": f"{row['slots']} of {row['sites_wanted']}",
        "modules in base": row["sites_marked"],
        "heads": row["parameters"],
        "adapters swapped": row["adapters_swapped"],
        "A → B → A": "exact" if row["swaps_are_exact"] else "NOT EXACT",
    }


def _architecture(architecture: Any, folder: Path) -> Row:
    from edgeadapt import Recipe, export_bundle, load_base_model, read_adapters
    from edgeadapt.adapters.resolve import resolve
    from tests.e2e.tiny import build

    base, adapters = build(architecture, folder)
    modules = load_base_model(base, task=architecture.task).modules
    wanted = {site for path in adapters for a in read_adapters(path) for site in resolve(a, modules).sites}
    started, cpu = time.perf_counter(), time.process_time()
    bundle = export_bundle(
        Recipe(tuple(adapters), str(base), folder / "tiny.bundle", task=architecture.task, quantize="none")
    )
    export_s, export_cpu_s = time.perf_counter() - started, time.process_time() - cpu
    manifest = bundle.manifest
    worst: dict[str, float] = {}
    for row in manifest.parity["rows"]:
        name = row["adapter"] or "base"
        worst[name] = max(worst.get(name, 0.0), row["max_relative_error"])
    return {
        "architecture": architecture.name,
        "task": architecture.task,
        "export_s": export_s,
        "export_cpu_s": export_cpu_s,
        "parity": worst,
        "modes": sorted({row["mode"] for row in manifest.parity["rows"]}),
        "sites_marked": len(modules),
        "sites_wanted": len(wanted),
        "slots": len(manifest.slots),
        "parameters": len(manifest.parameters),
        "adapters_swapped": len(manifest.adapters),
        "swaps_are_exact": manifest.parity["swaps_are_exact"],
    }


def write_page(date: str, table: str) -> None:
    """Write docs/benchmarks/architectures.md."""
    page = REPOSITORY / "docs" / "benchmarks" / "architectures.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    text = f"""# Architectures

Measured on {date} by `python benchmarks/must_show.py architectures` (raw figures:
`benchmarks/results/architectures.json`). Each row is a tiny random model with two adapters of rank 4 and 2 that peft
saved (`tests/e2e/tiny.py`), exported in float32 to one bundle.

- **parity**: the largest error of an output, relative to its largest value, against peft's unmerged forward in torch,
  over all ways to run it (decoders: whole, in chunks, token by token; batches whose rows differ in length).
- **export s (CPU s)**: tracing, fusing, comparing with torch in every way to run, writing. Other work on the machine
  (`load_average` in the raw figures) stretches the seconds, hardly the CPU seconds.
- **sites kept**: modules with slots in the exported graph, of those that at least one of the two adapters changes;
  **heads**: parameters that adapters replace whole.
- **A → B → A**: the same bits again after other adapters were active.

{table}"""
    page.write_text(text.rstrip() + "\n", encoding="utf-8")
