"""Sections of docs/benchmarks.md that come from results of their own: quality at 4 bits, memory of several sessions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from figures import table

MB = 1e6
QUALITY = """KL and top-1 (accuracy for the classifier) against the original in float32, through the session, on texts
that nothing was fitted to, next to the bits that a weight of a linear layer takes, scales and zero points included
(`benchmarks/int4_quality.py`). *nearest* is rounding without samples; *feedback* rounds one column after the other and
makes up for the error, on what the base and its adapters do; *mixed* gives some layers 8 bits."""
SESSIONS = """Proportional memory (PSS) of sessions in one process and in processes of their own, each with the plain
and the slots graph open and two adapters resident (`benchmarks/memory.py`). *shared*: `share_weights`."""


def quality_section(result: Mapping[str, Any] | None) -> str:
    """The section's text."""
    if result is None:
        return "## Quality at 4 bits\n\nNot measured."
    parts = [f"## Quality at 4 bits\n\n{QUALITY}"]
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["model"] == model]
        settings = dict.fromkeys(row["setting"] for row in rows)
        lines = [_quality_row([row for row in rows if row["setting"] == setting]) for setting in settings]
        parts.append(f"**{model}**\n\n{table(lines)}")
    return "\n\n".join(parts)


def _quality_row(rows: list[Mapping[str, Any]]) -> dict[str, str]:
    """One setting: its size, and each text's quality. An adapter is judged on its own task, the base on prose."""
    line = {
        "setting": rows[0]["setting"],
        "bits": f"{rows[0]['linear_bits_per_weight']:.2f}",
        "weights MB": f"{rows[0]['weight_bytes'] / MB:.1f}",
    }
    for row in rows:
        if (row["texts"] == "tasks") != (row["adapter"] is not None) and row["texts"] != "test":
            continue
        right = row["top1"] if row.get("accuracy") is None else row["accuracy"]
        line[f"{row['adapter'] or 'base'}: KL"] = f"{row['mean_kl']:.4f}"
        line[f"{row['adapter'] or 'base'}: right"] = f"{right:.1%}"
    return line


def sessions_section(result: Mapping[str, Any] | None) -> str:
    """The section's text."""
    if result is None:
        return "## Several sessions\n\nNot measured."
    rows = [
        {
            "bundle": bundle["name"],
            "weights": "shared" if row["share_weights"] else "own",
            "sessions": str(row["sessions"]),
            "processes": str(row["processes"]),
            "PSS MB": f"{row['pss'] / MB:.0f}",
            "anonymous MB": f"{row['pss_anon'] / MB:.0f}",
        }
        for bundle in result["bundles"]
        for row in bundle["rows"]
    ]
    return f"## Several sessions\n\n{SESSIONS}\n\n{table(rows)}"
