"""A Markdown table of figures, a column for each profile, and what makes them doubtful."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgeadapt.profiling.figures import Profile
from edgeadapt.profiling.labels import labels, summary, table


def render(profiles: Sequence[Profile]) -> str:
    """Return the report."""
    head, *body = table(profiles)
    lines = ["# Profile" if len(profiles) == 1 else f"# {len(profiles)} profiles", ""]
    names = labels(profiles)
    lines += [f"- {_plain(name)}: {_plain(summary(each))}" for name, each in zip(names, profiles, strict=True)]
    lines += ["", _line(head), _line(["---", *("---:" for _ in head[1:])], plain=False), *map(_line, body)]
    for name, each in zip(names, profiles, strict=True):
        told = [*each.warnings, *each.notes, *(f"not measured: {failure}" for failure in each.failures)]
        if told:
            lines += ["", f"## Read with care: {_plain(name)}", "", *(f"- {_plain(text)}" for text in told)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str], *, plain: bool = True) -> str:
    return "| " + " | ".join(_plain(cell) if plain else cell for cell in cells) + " |"


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
