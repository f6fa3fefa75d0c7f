"""Prints what scripts/demo found as Markdown: answers with each adapter and with none, then the figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    """Read the answers and figures that the demo wrote, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=Path)
    parser.add_argument("bundle", type=Path)
    for flag in ("--sql", "--json"):
        parser.add_argument(flag, required=True, help="the prompt of that name")
    for flag in ("--setup-s", "--export-s", "--total-s"):
        parser.add_argument(flag, type=int, required=True)
    arguments = parser.parse_args()

    prompts = {"sql": arguments.sql, "json": arguments.json}
    print()
    for name, prompt in prompts.items():
        print(f"**{prompt}**\n")
        rows = [(adapter, _answer(arguments.answers, adapter, name)) for adapter in ("none", "sql", "json")]
        _table(("adapter", "answer"), rows)

    size = sum(file.stat().st_size for file in arguments.bundle.rglob("*") if file.is_file())
    figures = dict(_flat(json.loads((arguments.answers / "profile.json").read_text(encoding="utf-8"))))
    own = {
        "setup_s": arguments.setup_s,
        "export_s": arguments.export_s,
        "bundle_MB": size / 1e6,
        "demo_s": arguments.total_s,
    }
    _table(("figure", "value"), [(name, _number(value)) for name, value in {**own, **figures}.items()])


def _answer(folder: Path, adapter: str, prompt: str) -> str:
    found = json.loads((folder / f"{adapter}-{prompt}.json").read_text(encoding="utf-8"))
    assert found["adapter"] == (None if adapter == "none" else adapter), found
    text = " ".join(found["text"].split())
    return text.replace("|", "\\|") or "(nothing)"


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the numbers of a nested mapping under dotted names; texts and lists are left out."""
    found: list[tuple[str, float]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            found += _flat(item, f"{prefix}{key}.")
        elif isinstance(item, int | float) and not isinstance(item, bool):
            found.append((prefix + key, item))
    return found


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(2)]
    for row in [header, tuple("-" * width for width in widths), *rows]:
        print("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)


if __name__ == "__main__":
    main()
