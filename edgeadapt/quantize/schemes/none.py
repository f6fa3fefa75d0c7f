"""Weights stay float32."""

from __future__ import annotations

from collections.abc import Sequence

from edgeadapt.quantize.scheme import Settings, Stored
from edgeadapt.quantize.weights import Weight

SUMMARY = "float32, as trained"
BLOCK_SIZE = 32


def usual(_weight: Weight) -> tuple[str, str]:
    """Return this scheme for every weight."""
    return "none", ""


def refuses(_weight: Weight) -> str | None:
    """Return None: any weight can stay as it is."""
    return None


def apply(uses: Sequence[Weight], _settings: Settings) -> Stored:
    """Change nothing."""
    first = uses[0]
    name = str(first.initializer.name)
    return Stored(first.tensor.nbytes, None, lambda other: {name: other.T if first.transposed else other})
