"""Systems whose equations could not be read anywhere: refused by name, for nothing tells what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.errors import AdapterError

KINDS: Mapping[str, str] = {}
TERMS: frozenset[str] = frozenset()
REFUSED: Mapping[str, tuple[str, str]] = {
    "vmt_adapter": (
        "VMT-Adapter (arXiv 2312.08733) has no public code, and the equations of its paper could not be read",
        "train one parallel bottleneck per task (AdapterHub's par_bn): a bundle swaps them",
    ),
}


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of such a system."""
    return layout == "edgeadapt" and config["edgeadapt_type"] in REFUSED


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the system's name."""
    return str(config["edgeadapt_type"])


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse the adapter.

    Raises:
        AdapterError: always, with the reason.
    """
    reason, hint = REFUSED[kind_of(config)]
    raise AdapterError(f"edgeadapt_type {kind_of(config)!r} cannot be exported: {reason}", hint=hint)


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Refuse the adapter, as `check` does before."""
    return check(adapter.config)
