"""Class names that go with an adapter's head. peft does not save them; a `labels.json` beside the adapter does."""

from __future__ import annotations

from pathlib import Path

from edgeadapt.adapters.adapter import Adapter
from edgeadapt.errors import AdapterError
from edgeadapt.files import parse_json, read_bytes

FILE_NAME = "labels.json"
_HINT = 'write {"labels": ["first class", "second class", ...]} in the order of the class indices, or remove the file'


def read_labels(adapter: Adapter, classes: int | None) -> tuple[str, ...]:
    """Return the class names beside `adapter`, () where there is no such file.

    Args:
        adapter: looked at where its files lie.
        classes: how many classes its head has, None if it brings no head.

    Raises:
        AdapterError: if the file is not {"labels": [names]}, or names another number of classes.
    """
    path = Path(adapter.path) / FILE_NAME
    if not path.is_file():
        return ()
    data = parse_json(read_bytes(path, max_bytes=1 << 24), str(path), AdapterError)
    labels = data.get("labels") if isinstance(data, dict) and set(data) == {"labels"} else None
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise AdapterError(f"{path} does not hold a list of class names", hint=_HINT)
    if classes is not None and classes != len(labels):
        raise AdapterError(f"{path} names {len(labels)} classes, the adapter's head has {classes}", hint=_HINT)
    return tuple(labels)
