"""What the tests measured of every kind of adapter against the library that saved it: tests/parity.json.

A test that compares a bundle with a library's own forward tells it here (the fixture `parity`), and fails if the file
does not hold that comparison. `pytest -n 0 --record-parity` writes the file. `scripts/adapters_page.py` makes
docs/adapters.md of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeadapt.adapters import describe, read_adapters

FILE = Path(__file__).parent / "parity.json"
FORMS = ("swapped", "merged", "blended")


@dataclass(frozen=True)
class Row:
    """One comparison.

    kind: edgeadapt's name of it; adapter: what kind of it, such as a config's name; source: the library that saved it
    model: the base's; form: how it ran; error: the largest difference, relative to the largest value
    reason: why it folds into weights or not (of the kind, for people)
    """

    kind: str
    adapter: str
    source: str
    model: str
    form: str
    error: float
    reason: str

    @property
    def key(self) -> tuple[str, ...]:
        """What is the same when the comparison is made again."""
        return self.kind, self.adapter, self.source, self.model, self.form


class Parity:
    """The comparisons of one run.

    recording: they are written into the file, instead of looked up in it
    """

    def __init__(self, *, recording: bool) -> None:
        self.recording = recording
        self._rows: dict[tuple[str, ...], Row] = {}
        self._known = {row.key: row for row in recorded()}

    def add(
        self, folder: Path, model: str, *, source: str = "peft", adapter: str = "", errors: Mapping[str, float]
    ) -> None:
        """Tell how far forms of a saved adapter are from what it is compared with; the worst of several counts."""
        assert errors.keys() <= set(FORMS)
        (first, *_) = read_adapters(folder)
        reason = describe(first)["merge"]["reason"]
        for form, error in errors.items():
            row = Row(first.kind, adapter or first.kind, source, model, form, float(f"{error:.0e}"), reason)
            assert self.recording or row.key in self._known, f"{row.key} is not in {FILE}: run with --record-parity"
            if row.key not in self._rows or self._rows[row.key].error < row.error:
                self._rows[row.key] = row

    def write(self) -> None:
        """Write the file: what was measured, and what it held of comparisons that were not made."""
        found = self._known | self._rows
        lines = ",\n".join(json.dumps(asdict(found[key])) for key in sorted(found))
        FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def recorded() -> tuple[Row, ...]:
    """Return what the file holds."""
    return tuple(Row(**row) for row in json.loads(FILE.read_text(encoding="utf-8"))) if FILE.exists() else ()
