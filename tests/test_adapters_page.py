"""docs/adapters.md says of every kind what was measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edgeadapt.adapters.kind import known_kinds
from tests.parity import recorded


def test_the_page_is_fresh(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, root / "scripts" / "adapters_page.py", "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_kind_was_compared() -> None:
    rows = recorded()
    assert {row.kind for row in rows} == set(known_kinds())
    assert {row.kind for row in rows if row.form == "swapped"} == set(known_kinds())
    assert max(row.error for row in rows) < 1e-4
