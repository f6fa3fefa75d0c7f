"""Class names that go with an adapter's head: a `labels.json` beside the adapter, or what its library saved.

peft saves none; AdapterHub saves them in a head's config.
"""

from __future__ import annotations

from pathlib import Path

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.errors import AdapterError
from edgeadapt.files import parse_json, read_bytes

FILE_NAME = "labels.json"
_HINT = 'write {"labels": ["first class", "second class", ...]} in the order of the class indices, or remove the file'


def read_labels(adapter: Adapter, classes: int | None) -> tuple[str, ...]:
    """Return the class names beside `adapter`, () where there are none.

    Args:
        adapter: looked at where its files lie.
        classes: how many classes its head has, None if it brings no head.

    Raises:
        AdapterError: if the file is not {"labels": [names]}, or names another number of classes.
    """
    path = Path(adapter.path) / FILE_NAME
    if not path.is_file():
        return _of_head(adapter, classes)
    data = parse_json(read_bytes(path, max_bytes=1 << 24), str(path), AdapterError)
    labels = data.get("labels") if isinstance(data, dict) and set(data) == {"labels"} else None
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise AdapterError(f"{path} does not hold a list of class names", hint=_HINT)
    if classes is not None and classes != len(labels):
        raise AdapterError(f"{path} names {len(labels)} classes, the adapter's head has {classes}", hint=_HINT)
    return tuple(labels)


def _of_head(adapter: Adapter, classes: int | None) -> tuple[str, ...]:
    """Return the class names in the config of a head that AdapterHub saved, () where they name other classes."""
    head = adapter.config.get("head") or {}
    indices = (head.get("config") or head).get("label2id")
    if classes is None or not isinstance(indices, dict) or sorted(map(str, indices.values())) != _numbers(classes):
        return ()
    return tuple(str(label) for label, _ in sorted(indices.items(), key=lambda item: int(item[1])))


def _numbers(count: int) -> list[str]:
    return sorted(map(str, range(count)))
