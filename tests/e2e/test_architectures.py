"""Every architecture: two adapters of different rank through the whole pipeline, against peft's unmerged forward."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeadapt.addition import verify_bundle
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from tests.e2e.reference import CLOSE
from tests.e2e.tiny import ARCHITECTURES, Architecture, build
from tests.parity import Parity


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_two_adapters_of_different_rank_equal_peft(architecture: Architecture, tmp_path: Path, parity: Parity) -> None:
    base, adapters = build(architecture, tmp_path)
    output = tmp_path / "tiny.bundle"

    bundle = export_bundle(Recipe(tuple(adapters), str(base), output, task=architecture.task, quantize="none"))

    rows = bundle.manifest.parity["rows"]
    assert {row["adapter"] for row in rows} == {None, "adapter0", "adapter1"}
    assert max(row["max_relative_error"] for row in rows) == bundle.manifest.parity["max_relative_error"]
    errors = {"swapped": bundle.manifest.parity["max_relative_error"]}
    parity.add(adapters[0], architecture.name, adapter="LoRA", errors=errors)
    # T5's logits are sums over relative positions that nearly cancel.
    assert bundle.manifest.parity["max_relative_error"] < CLOSE
    assert {bundle.manifest.adapters[name].rank for name in ("adapter0", "adapter1")} == {4, 2}
    assert len(bundle.manifest.slots) >= 2
    assert verify_bundle(output) == []
