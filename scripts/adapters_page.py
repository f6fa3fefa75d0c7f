"""Writes docs/adapters.md: every kind of adapter, and what was measured of it.

python scripts/adapters_page.py            from the registry and tests/parity.json (pytest --record-parity)
python scripts/adapters_page.py --check    fail if the page is another one
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgeadapt import registry
from edgeadapt.adapters.kind import KINDS, known_kinds
from edgeadapt.errors import AdapterError
from tests.parity import FORMS, Row, recorded

PAGE = ROOT / "docs" / "adapters.md"
TRAINED = ROOT / "benchmarks" / "results" / "real_adapters.json"
HEAD = """# Adapters

Written by `scripts/adapters_page.py` from the registry, from what the tests measured (`tests/parity.json`), and from
`benchmarks/real_adapters.py`.

Each figure is the largest difference of a bundle's outputs (unquantized, through the session that an app uses) from the
forward of the library that trained the adapter, unmerged, or from a torch model after the paper where no library trains
one, relative to the largest output, over small random models of the architectures that are named. It must be below
1e-4. *Swapped*: beside the base, with other adapters in the same bundle. *Merged*: in the weights (`--merge`).
*Blended*: in two parts of a weighted blend. A dash: not possible, for the reason given, or not compared.
"""


def page(rows: Sequence[Row]) -> str:
    """Return the page's text."""
    parts = [HEAD, _overview(rows), _trained(), _details(rows), _refused()]
    return "\n".join(parts)


def _overview(rows: Sequence[Row]) -> str:
    lines = []
    for kind, summary in known_kinds().items():
        own = [row for row in rows if row.kind == kind]
        figures = [_worst(row.error for row in own if row.form == form) for form in FORMS]
        reason = "" if any(row.form == "merged" for row in own) else "; ".join(sorted({row.reason for row in own}))
        lines.append([f"`{kind}`", summary.rstrip("."), _joined(row.source for row in own), *figures, reason])
    count = sum(1 for _ in {row.key for row in rows})
    head = ["kind", "what it is", "saved by", *FORMS, "why it is not merged"]
    return f"## Kinds\n\n{len(lines)} kinds, {count} comparisons.\n\n" + _table(head, lines)


def _trained() -> str:
    rows = json.loads(TRAINED.read_text(encoding="utf-8"))["rows"]
    ways = list(rows[0]["scores"])
    lines = [
        [
            *(row["model"], f"{row['adapter']} (`{row['kind']}`)", row["saved_by"], str(row["parameters"])),
            f"{row['samples']} {row['what']}",
            *(f"{row['scores'][way]:.1%}" for way in ways),
        ]
        for row in rows
    ]
    head = ["model", "adapter", "saved by", "parameters", "share of", "in its library", *ways[1:]]
    said = "Of recipes/training, all of a model in one bundle at each precision (`none` is float32)."
    return f"## Trained adapters\n\n{said}\n\n" + _table(head, lines)


def _details(rows: Sequence[Row]) -> str:
    def adapter(row: Row) -> tuple[str, str, str]:
        return row.kind, row.adapter, row.source

    lines = []
    for (kind, name, source), group in groupby(sorted(rows, key=adapter), key=adapter):
        own = list(group)
        figures = [_worst(row.error for row in own if row.form == form) for form in FORMS]
        lines.append([f"`{kind}`", name, source, _joined(row.model for row in own), *figures])
    return "## Comparisons\n\n" + _table(["kind", "adapter", "saved by", "models", *FORMS], lines)


def _refused() -> str:
    lines = []
    for file in registry.names(KINDS):
        module = registry.load(KINDS, file, AdapterError)
        lines += [[f"`{name}`", *why] for name, why in getattr(module, "REFUSED", {}).items()]
    return "## Refused\n\nBy name, before anything is written:\n\n" + _table(["kind", "reason", "instead"], lines)


def _worst(errors: Iterable[float]) -> str:
    found = list(errors)
    return f"{max(found):.0e}".replace("e-0", "e-").replace("0e+00", "0") if found else "-"


def _joined(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page(recorded())
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{PAGE} is not what scripts/adapters_page.py writes: run it")


if __name__ == "__main__":
    main()
