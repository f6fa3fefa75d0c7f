"""Make the Debian data sets: a package's short description -> its archive section, and -> what kind of package it is.

    apt-cache dumpavail | python recipes/training/make_debian.py recipes/data

Labels are Debian's own: the `Section` field, and the `role::` facet of the `Tag` field. At most one package per source
package and label, and a source package is on one side of the split only, so that sibling packages with nearly the same
description are never both in training and test; a description that training shows is left out of the test. Balanced;
the order comes from hashes of the names, so that the same package list always gives the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

SECTIONS = ("editors", "games", "graphics", "mail", "net", "python", "science", "sound")
KINDS = {
    "role::documentation": "documentation",
    "role::shared-lib": "library",
    "role::devel-lib": "library",
    "role::plugin": "plugin",
    "role::program": "program",
}
TEST_SHARE = 4  # one source package in four is for the test
TRAIN_PER_LABEL, TEST_PER_LABEL = 150, 50
MAX_LENGTH = 120

Fields = dict[str, str]


def main() -> None:
    """Write NAME.train.jsonl and NAME.test.jsonl for both data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    packages = sorted(read_packages(sys.stdin.read()), key=lambda p: _digest(p["Package"]))
    for name, label_of in (("debian-section", section), ("debian-kind", kind)):
        shown: set[str] = set()
        for split, count in (("train", TRAIN_PER_LABEL), ("test", TEST_PER_LABEL)):
            rows = choose([p for p in packages if _text(p).lower() not in shown], label_of, split, count)
            shown |= {row["text"].lower() for row in rows}
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            (folder / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{name}.{split}: {len(rows)} rows, labels {sorted({row['label'] for row in rows})}")


def read_packages(text: str) -> Iterable[Fields]:
    """The packages of an `apt-cache dumpavail` listing that have a short description."""
    for block in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*(?:\n .*)*)$", block, re.MULTILINE))
        if "Package" in fields and 10 <= len(_text(fields)) <= MAX_LENGTH:
            yield fields


def section(package: Fields) -> str | None:
    """The archive section, if it is one of the eight."""
    value = package.get("Section")
    return value if value in SECTIONS else None


def kind(package: Fields) -> str | None:
    """The kind, if the package's role tags name exactly one."""
    kinds = {KINDS.get(role) for role in re.findall(r"role::[a-z-]+", package.get("Tag", ""))}
    return kinds.pop() if len(kinds) == 1 else None


def choose(
    packages: Iterable[Fields], label_of: Callable[[Fields], str | None], split: str, count: int
) -> list[dict[str, str]]:
    """`count` rows per label, in the order of `packages`."""
    taken: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    rows = []
    for package in packages:
        source = package.get("Source", package["Package"]).partition(" ")[0]
        if (int(_digest(source), 16) % TEST_SHARE == 0) != (split == "test"):
            continue
        label, text = label_of(package), _text(package)
        if label is None or taken.get(label, 0) == count:
            continue
        if (label, source) in seen or ("text", text.lower()) in seen:
            continue
        seen |= {(label, source), ("text", text.lower())}
        taken[label] = taken.get(label, 0) + 1
        rows.append({"text": text, "label": label})
    short = {label: n for label, n in taken.items() if n < count}
    if short or not taken:
        sys.exit(f"too few packages in {split}: {short or 'none'} of {count}; run `apt-get update` first")
    return rows


def _text(package: Fields) -> str:
    return package.get("Description", "").partition("\n")[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
