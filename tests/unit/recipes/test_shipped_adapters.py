"""The adapters that ship with the repository are whole, small, and say what they were trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from edgeadapt.adapters.read import read_adapters

LARGEST_ADAPTER_BYTES = 4_000_000
LARGEST_DATA_BYTES = 200_000
# Name -> (rank, tensors of the LoRA itself, rows of the saved head)
SHIPPED = {
    "sql": (4, 420, None),
    "json": (4, 420, None),
    "debian-section": (8, 74, 8),
    "debian-kind": (8, 74, 4),
    "digits": (4, 64, 10),
}


# Name -> (kind, parameters without the head)
OTHERS = {
    "section-houlsby": ("bottleneck", 447552),
    "section-pfeiffer": ("bottleneck", 223776),
    "sql-dora": ("lora", 1376640),
    "sql-ia3": ("ia3", 57600),
    "sql-prefix": ("prefix_tuning", 184320),
}


def test_the_lists_above_are_the_folder(root: Path) -> None:
    assert sorted(path.name for path in (root / "recipes" / "adapters").iterdir()) == sorted({**SHIPPED, **OTHERS})


@pytest.mark.parametrize("name", OTHERS)
def test_one_of_another_kind_is_read_without_a_warning(root: Path, name: str) -> None:
    folder = root / "recipes" / "adapters" / name
    kind, count = OTHERS[name]
    (adapter,) = read_adapters(folder)
    heads = sum(math.prod(ref.shape) for key, ref in adapter.tensors.items() if key.startswith("classifier."))
    assert (adapter.kind, adapter.warnings) == (kind, ())
    assert sum(math.prod(ref.shape) for ref in adapter.tensors.values()) - heads == count
    assert adapter.base.fingerprint is not None
    assert sum(path.stat().st_size for path in folder.iterdir()) < LARGEST_ADAPTER_BYTES
    assert "%" in (folder / "README.md").read_text(encoding="utf-8")  # the measured score


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_adapter_is_read_without_a_warning(root: Path, name: str) -> None:
    folder = root / "recipes" / "adapters" / name
    rank, lora_count, classes = SHIPPED[name]
    (adapter,) = read_adapters(folder)
    lora = [ref for key, ref in adapter.tensors.items() if ".lora_" in key]
    assert adapter.warnings == ()
    assert adapter.base.fingerprint is not None
    assert len(lora) == lora_count
    assert {min(ref.shape[:2]) for ref in lora} == {rank}
    assert sum(path.stat().st_size for path in folder.iterdir()) < LARGEST_ADAPTER_BYTES
    assert "%" in (folder / "README.md").read_text(encoding="utf-8")  # the measured score
    heads = {ref.shape[0] for key, ref in adapter.tensors.items() if ".lora_" not in key}
    assert heads == (set() if classes is None else {classes})


@pytest.mark.parametrize("name", [name for name, (_, _, classes) in SHIPPED.items() if classes])
def test_labels_are_as_many_as_the_head_has_rows_and_are_not_in_the_fingerprint(root: Path, name: str) -> None:
    folder = root / "recipes" / "adapters" / name
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))["labels"]
    (adapter,) = read_adapters(folder)
    assert len(set(labels)) == SHIPPED[name][2]
    # The base has no such head: stamping one would tie the adapter to a base with the same number of classes.
    assert not [key for key in adapter.base.fingerprint or {} if "classifier" in key or "_fc" in key]


@pytest.mark.parametrize("name", ["debian-section", "debian-kind"])
def test_data_rows_are_balanced_small_and_on_one_side_of_the_split(root: Path, name: str) -> None:
    texts = {}
    for split, count in (("train", 150), ("test", 50)):
        file = root / "recipes" / "data" / f"{name}.{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        labels = [row["label"] for row in rows]
        assert file.stat().st_size <= LARGEST_DATA_BYTES
        assert {labels.count(label) for label in labels} == {count}
        texts[split] = {row["text"].lower() for row in rows}
    assert not texts["train"] & texts["test"]
