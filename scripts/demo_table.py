"""Prints what scripts/demo found as Markdown: answers with each adapter and with none, quality, figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edgeadapt.bundle import open_bundle
from edgeadapt.errors import ProfileError
from edgeadapt.fields import from_mapping
from edgeadapt.profiling import Profile, rows


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
        answers = [(adapter, _answer(arguments.answers, adapter, name)) for adapter in ("none", "sql", "json")]
        _table(("adapter", "answer"), answers)

    _table(("adapter", "mean KL to float32 torch", "same top-1 token"), _quality(arguments.bundle))

    where = arguments.answers / "profile.json"
    profile = from_mapping(Profile, json.loads(where.read_text(encoding="utf-8")), str(where), ProfileError)
    own = [
        ("set up and fetch the model", f"{arguments.setup_s} s"),
        ("export two adapters to int8", f"{arguments.export_s} s"),
        ("this demo", f"{arguments.total_s} s"),
    ]
    figures = [(row["figure"], row["value"]) for row in rows(profile)]
    _table((f"figure ({profile.threads} threads, adapter {profile.adapter})", "value"), own + figures)
    for warning in profile.warnings:
        print(f"Note: {warning}")


def _answer(folder: Path, adapter: str, prompt: str) -> str:
    found = json.loads((folder / f"{adapter}-{prompt}.json").read_text(encoding="utf-8"))
    assert found["adapter"] == (None if adapter == "none" else adapter), found
    text = " ".join(found["text"].split())
    return text.replace("|", "\\|") or "(nothing)"


def _quality(bundle: Path) -> list[tuple[str, ...]]:
    return [
        (row["adapter"] or "none", f"{row['mean_kl']:.4f}", f"{row['top1']:.1%}")
        for row in open_bundle(bundle).manifest.quality
    ]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, tuple("-" * width for width in widths), *rows]:
        print("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)


if __name__ == "__main__":
    main()
