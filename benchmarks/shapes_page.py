"""The section on bigger shapes in docs/benchmarks.md, from results/shapes.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shapes_section(result: Mapping[str, Any] | None) -> str:
    """The section's text."""
    return "## Bigger shapes\n\nNot measured."
