"""What quantizing cost: a session's outputs against torch in float32, one row per adapter and one for the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import QuantizeError
from edgeadapt.memory import give_back
from edgeadapt.quality.compare import LOGITS, Comparison, compare, output_mask

Array = NDArray[Any]
Label = int | str
Mode = Literal["prefill", "decode"]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
DECODED_CASES = 32
"""Samples that are run token by token: two thousand steps or so for each adapter."""


@dataclass(frozen=True)
class QualityRow:
    """How far one adapter (None: the base) on the quantized base is from float32 torch; None where not defined.

    positions: tokens or samples that were compared
    mean_kl, max_kl: KL divergence in nats of the distributions over the last axis of "logits"
    top1: share of positions whose most likely token or class is the same
    max_relative_error: largest difference, relative to the largest value of the output in its case
    cosine: mean cosine similarity of the vectors in outputs other than logits
    accuracy, reference_accuracy: share of samples with the right label, here and in torch
    promoted: of the adapter's patch applied to the weights, rather than the adapter beside them
    mode: where the key-value cache is quantized, whether texts were read whole ("prefill") or token by token
        ("decode"); else None, since a float cache changes nothing
    """

    adapter: str | None
    scheme: str
    positions: int
    mean_kl: float | None
    max_kl: float | None
    top1: float | None
    max_relative_error: float
    cosine: float | None
    accuracy: float | None
    reference_accuracy: float | None
    promoted: bool = False
    mode: Mode | None = None


def measure_quality(
    session: Any,
    cases: Sequence[Mapping[str, Array]],
    references: Mapping[str | None, Sequence[Mapping[str, Array]]],
    scheme: str,
    labels: Sequence[Label] | None = None,
    *,
    class_names: Mapping[str, Sequence[str]] | None = None,
) -> tuple[QualityRow, ...]:
    """Return a row for every adapter in `references`, in that order.

    A model whose key-value cache is quantized gets two rows each, of prefill and of decode.

    Args:
        session: a `runtime.session.Session` over the quantized graph.
        cases: inputs by name, one sample each if there are labels.
        references: the original's outputs for each case, by adapter name; None for the base.
        scheme: how the graph was quantized, for the rows.
        labels: the right class of each case, an index or a name; adapters that know them all get an accuracy.
        class_names: an adapter's class names in the order of their indices, for adapters that the session's bundle
            does not hold yet.

    Raises:
        QuantizeError: if there is nothing to compare, or labels do not go with the cases.
        ExportError: if outputs cannot be compared.
    """
    if not cases or not references:
        raise QuantizeError("there is nothing to compare with", hint="give at least one sample")
    if labels is not None and len(labels) != len(cases):
        raise QuantizeError(f"{len(labels)} labels for {len(cases)} samples", hint="give one label per sample")
    classes = {} if labels is None else _all_classes(session, tuple(references), labels, class_names or {})
    rows = []
    for adapter, expected in references.items():
        give_back()
        session.use(adapter)
        rows += _rows(session, cases, expected, (adapter, scheme), classes.get(adapter))
    session.use(None)
    return tuple(rows)


def _ways(session: Any) -> dict[Mode | None, Run]:
    """Return how a case is run: once, or with a quantized cache whole and token by token."""
    spec = getattr(session, "spec", None)
    if spec is None or spec.cache_dtype == "float32":
        return {None: session.run}
    return {"prefill": session.run, "decode": partial(session.run, chunk_size=1)}


def _rows(
    session: Any,
    cases: Sequence[Mapping[str, Array]],
    expected: Sequence[Mapping[str, Array]],
    of: tuple[str | None, str],
    classes: Sequence[int] | None,
) -> list[QualityRow]:
    ways = _ways(session)
    comparisons: dict[Mode | None, list[Comparison]] = {mode: [] for mode in ways}
    right: list[tuple[bool, bool]] = []
    for index, (case, reference) in enumerate(zip(cases, expected, strict=True)):  # each reference is computed once
        for mode, run in ways.items():
            if mode == "decode" and index >= DECODED_CASES:
                continue
            measured = run(case)
            comparisons[mode].append(compare(reference, measured, output_mask(case)))
            if classes is not None and mode != "decode":
                right.append((_is_right(measured, classes[index]), _is_right(reference, classes[index])))
    return [
        replace(_row(found, of, right if mode != "decode" else []), mode=mode) for mode, found in comparisons.items()
    ]


def _row(
    comparisons: Sequence[Comparison], of: tuple[str | None, str], right: Sequence[tuple[bool, bool]]
) -> QualityRow:
    kl = _joined([c.kl for c in comparisons])
    agrees = _joined([c.agrees for c in comparisons])
    cosines = _joined([c.cosines for c in comparisons])
    counted = next((values for values in (kl, cosines) if values is not None), None)
    return QualityRow(
        adapter=of[0],
        scheme=of[1],
        positions=len(comparisons) if counted is None else len(counted),
        mean_kl=None if kl is None else _number(kl.mean()),
        max_kl=None if kl is None else _number(kl.max()),
        top1=None if agrees is None else float(agrees.mean()),
        max_relative_error=_number(max(comparison.worst[1] for comparison in comparisons)),
        cosine=None if cosines is None else _number(cosines.mean()),
        accuracy=float(np.mean([pair[0] for pair in right])) if right else None,
        reference_accuracy=float(np.mean([pair[1] for pair in right])) if right else None,
    )


def _all_classes(
    session: Any,
    adapters: Sequence[str | None],
    labels: Sequence[Label],
    class_names: Mapping[str, Sequence[str]],
) -> dict[str | None, list[int]]:
    """Return the class index of every label for each adapter that knows all of them: others have another task.

    Raises:
        QuantizeError: if no adapter knows the labels.
    """
    found = {}
    error = None
    for adapter in adapters:
        try:
            found[adapter] = _classes(session, adapter, labels, class_names)
        except QuantizeError as unknown:
            error = unknown if error is None or adapter is not None else error
    if error is not None and not found:
        raise error
    return found


def _classes(
    session: Any, adapter: str | None, labels: Sequence[Label], class_names: Mapping[str, Sequence[str]]
) -> list[int]:
    manifest = session.bundle.manifest
    stored = manifest.adapters[adapter].labels if adapter in manifest.adapters else ()
    names = (class_names.get(adapter) if adapter is not None else None) or stored or manifest.labels
    indices = {name: index for index, name in enumerate(names)}
    found = [label if isinstance(label, int) else indices.get(label, -1) for label in labels]
    if -1 in found:
        raise QuantizeError(
            f"the label {labels[found.index(-1)]!r} is no class of {_say(adapter)}"
            + (f", which has {', '.join(names)}" if names else ", whose classes have no names"),
            hint="label the samples with class names as the adapter's config has them, or with class indices",
        )
    return found


def _say(adapter: str | None) -> str:
    return "the base" if adapter is None else f"adapter {adapter!r}"


def _is_right(outputs: Mapping[str, Array], wanted: int) -> bool:
    logits = outputs.get(LOGITS)
    if logits is None or logits.ndim != 2 or len(logits) != 1:
        raise QuantizeError(
            "the samples have labels, but the model gives no class for a sample",
            hint="labels are for classification; leave them out for other tasks",
        )
    return int(logits[0].argmax()) == wanted


def _joined(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None


def _number(value: Any) -> float:
    """Return a finite float: JSON has no infinity, and a model that gives NaN has no quality to record.

    Raises:
        QuantizeError: for NaN and infinity.
    """
    if not np.isfinite(value):
        raise QuantizeError(
            "the quantized model gives NaN or infinity", hint="use a scheme with more bits, or --quantize none"
        )
    return float(value)
