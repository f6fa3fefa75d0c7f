"""Figures as comma-separated values: a row for each figure, a column for each profile, in seconds and bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from edgeadapt.profiling.catalogue import FIGURES
from edgeadapt.profiling.figures import Profile
from edgeadapt.profiling.labels import labels

_FACTS: dict[str, Callable[[Profile], object]] = {
    "bundle": lambda profile: profile.bundle,
    "adapter": lambda profile: profile.adapter,
    "precision": lambda profile: profile.precision,
    "device": lambda profile: profile.device.name,
    "runtime": lambda profile: f"{profile.runtime} {profile.runtime_version}",
    "threads": lambda profile: profile.threads,
    "noisy": lambda profile: "yes" if profile.noisy else "no",
}


def render(profiles: Sequence[Profile]) -> str:
    """Return the report; a figure that was not measured is an empty cell."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([_cell(cell) for cell in ("figure", *labels(profiles))])
    for name, fact in _FACTS.items():
        writer.writerow([name, *(_cell(fact(each)) for each in profiles)])
    for name, figure in FIGURES.items():
        writer.writerow([name, *(_cell(figure.read(each)) for each in profiles)])
    return file.getvalue()


def _cell(value: object) -> object:
    """Return a cell that a spreadsheet does not take for a formula."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return "" if value is None else value
