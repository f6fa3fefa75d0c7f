"""Examples for a Tip-Adapter in a bundle that exists: no training, without torch; a row per example."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt import bundle as bundles
from edgeadapt.addition import record_golden
from edgeadapt.bundle.bind import unbind
from edgeadapt.bundle.bundle import Bundle
from edgeadapt.bundle.manifest import AdapterRecord
from edgeadapt.bundle.names import check_adapter_name
from edgeadapt.errors import BundleError
from edgeadapt.progress import SILENT, Progress
from edgeadapt.runtime.features import features_of
from edgeadapt.runtime.opening import open_session
from edgeadapt.slots import BranchSlot

Array = NDArray[Any]
ALPHA, BETA = 1.0, 5.5
"""The paper's, for an adapter that is made of its first examples."""


def enroll(
    bundle: Bundle | Path | str,
    name: str,
    inputs: Mapping[str, Array],
    classes: Sequence[int | str],
    *,
    alpha: float | None = None,
    beta: float | None = None,
    progress: Progress = SILENT,
) -> Bundle:
    """Add examples to Tip-Adapter `name` of a bundle, or make it of them, and return the bundle opened anew.

    Args:
        bundle: a bundle's folder, or what `open_bundle` returned; one that was exported with a Tip-Adapter.
        name: the adapter's.
        inputs: the examples, by the graph's input names, batched on axis 0.
        classes: of each example, a class's label or index (a number in digits too, where no label is).
        alpha: what all votes are multiplied by, None for as it is (1 for a new adapter).
        beta: how much closer examples count for more, None for as it is (5.5 for a new adapter).
        progress: told of each stage.

    Raises:
        BundleError: the bundle has no place for a Tip-Adapter, the adapter is another, or a class is unknown.
        SessionError: an input is unknown, missing or of the wrong shape.
    """
    opened = bundle if isinstance(bundle, Bundle) else bundles.open_bundle(Path(bundle))
    slot = _slot(opened)
    known = name in opened.adapter_names
    if not known:
        check_adapter_name(name, opened.adapter_names)
    with progress.stage("read the adapter"):
        tensors = dict(opened.adapter_tensors(name)) if known else _empty(opened, slot)
        if slot.inputs["keys"] not in tensors:
            raise BundleError(
                f"adapter {name!r} is a {opened.adapter_record(name).kind}, and only a Tip-Adapter takes examples",
                hint="choose another name; a new one makes a new adapter",
            )
        columns = tensors[slot.inputs["values"]].shape[1]
        values = _one_hot([_class_index(opened, name, item, columns) for item in classes], columns)
    with open_session(opened) as session:
        with progress.stage("read the examples"):
            session.lend(name, tensors)
            session.use(name)
            keys = features_of(session, slot, inputs)
            session.use(None)
            _check_features(name, keys, len(values))
            tensors = _appended(tensors, slot, keys, values, known=known)
            for term, value, usual in (("weight", alpha, ALPHA), ("sharpness", beta, BETA)):
                if value is not None or not known:
                    tensors[slot.inputs[term]] = np.array([usual if value is None else value], np.float32)
        with progress.stage("record golden outputs"):
            session.lend(name, bundles.as_stored(tensors, opened.manifest.adapter_dtype))
            golden = record_golden(session, name)
    record = _record(opened, name, tensors, known=known)
    with progress.stage("write"):
        return bundles.insert_adapter(opened, name, tensors, record, golden, replace=known)


def _slot(bundle: Bundle) -> BranchSlot:
    found = [slot for slot in bundle.manifest.branches if slot.form == "cache"]
    if len(found) != 1:
        raise BundleError(
            f"{bundle.path} has {len(found) or 'no'} places for a Tip-Adapter, and examples go to one",
            hint="export the bundle together with one Tip-Adapter (docs/formats/adapter-folder.md)",
        )
    return found[0]


def _empty(bundle: Bundle, slot: BranchSlot) -> dict[str, Array]:
    """Return a cache of one row that votes for nothing, so that the graph with features runs."""
    module = next(module for module in bundle.manifest.base.modules if module.path == slot.site)
    shapes = {"keys": (1, module.in_features), "values": (1, module.out_features), "weight": (1,), "sharpness": (1,)}
    return {slot.inputs[term]: np.zeros(shape, np.float32) for term, shape in shapes.items()}


def _class_index(bundle: Bundle, name: str, item: int | str, columns: int) -> int:
    labels = bundle.labels_of(name if name in bundle.adapter_names else None)
    index: int | str = labels.index(str(item)) if item in labels else item
    if isinstance(index, str) and index.isdecimal():
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < columns:
        known = ", ".join(labels) if labels else f"0 to {columns - 1}"
        raise BundleError(f"there is no class {item!r}", hint=f"classes: {known}")
    return index


def _one_hot(indices: Sequence[int], columns: int) -> Array:
    return np.eye(columns, dtype=np.float32)[np.array(indices, np.int64)]


def _check_features(name: str, keys: Array, classes: int) -> None:
    if len(keys) != classes:
        raise BundleError(
            f"{len(keys)} examples and {classes} classes were given for adapter {name!r}",
            hint="give one class for each example",
        )
    if not np.isfinite(keys).all():
        raise BundleError(
            f"an example for adapter {name!r} gives features that are not finite",
            hint="give inputs as the model takes them; a picture of nothing has no direction",
        )


def _appended(
    tensors: Mapping[str, Array], slot: BranchSlot, keys: Array, values: Array, *, known: bool
) -> dict[str, Array]:
    result = dict(tensors)
    for term, rows in (("keys", keys), ("values", values)):
        old = [tensors[slot.inputs[term]]] if known else []
        result[slot.inputs[term]] = np.concatenate([*old, rows]).astype(np.float32)
    return result


def _record(bundle: Bundle, name: str, tensors: Mapping[str, Array], *, known: bool) -> AdapterRecord:
    parameters = unbind(name, tensors, bundle.manifest).parameter_count
    if known:
        return dataclasses.replace(bundle.adapter_record(name), parameters=parameters)
    return AdapterRecord("tip_adapter", 0, parameters, 0.0, 0.0, base_checked="stamp")  # made on this base itself
