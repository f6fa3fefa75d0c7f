"""Graph to Graph with smaller weights; markers and the parameters that adapters replace stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeadapt.errors import QuantizeError
from edgeadapt.export.graph import Graph
from edgeadapt.progress import SILENT, Progress
from edgeadapt.quantize import BLOCK_SIZES
from edgeadapt.quantize.patch import Variant
from edgeadapt.quantize.plan import Choice, choose_schemes, load_scheme
from edgeadapt.quantize.residual import Residual
from edgeadapt.quantize.retie import retie
from edgeadapt.quantize.rewrite import CONTRIB, drop_unused
from edgeadapt.quantize.rounded import RoundedWeights
from edgeadapt.quantize.scheme import Moments, Settings, Stored, moment_of
from edgeadapt.quantize.weights import find_weights


@dataclass(frozen=True)
class _Entry:
    """One constant after quantizing, for the record."""

    path: str
    kind: str
    scheme: str
    reason: str
    elements: int
    bytes_before: int
    stored: Stored
    tied: bool


def quantize(
    graph: Graph,
    scheme: str,
    *,
    keep: Mapping[str, str] | None = None,
    moments: Moments | None = None,
    block_size: int | None = None,
    raised: Collection[str] = (),
    variants: Sequence[Variant] = (),
    residual: Residual | None = None,
    rounded: RoundedWeights | None = None,
    progress: Progress = SILENT,
) -> tuple[Graph, dict[str, Any]]:
    """Return `graph` with its weights stored as `scheme` says, and the record of what was done.

    `graph` is left as it is: the result's models are copies that share every constant that does not change, so only
    the smaller weights are new memory, plus one weight in float32 at a time.

    Args:
        graph: ONNX models with markers in place.
        scheme: a file name in `quantize/schemes` ("none", "fp16", "int8", "int4").
        keep: exceptions, scheme by glob pattern of module paths ({"lm_head": "int8", "*.down_proj": "none"}); the
            first pattern that matches a path decides.
        moments: by module path, float32[in, in]: the mean of x x^T over the calibration texts' inputs x of a linear
            layer. With them int4 rounds with error feedback; the record counts how many layers used theirs.
        block_size: weights that share a scale: 16, 32, 64, 128 or 256; None for the scheme's own.
        raised: module paths that get 8 bits where the scheme would give them 4 (`quantize.mixed`).
        variants: adapters whose merged weights are to be rounded on the same grid; filled.
        residual: of what rounding leaves; filled.
        rounded: weights in 4 bits from earlier calls with the same graph, moments and block size; filled.
        progress: told of each weight.

    Raises:
        QuantizeError: if the scheme is unknown, nothing can be quantized, a pattern of `keep` matches nothing, or
            moments are damaged or of the wrong shape.
    """
    usual = load_scheme(scheme)
    size = usual.BLOCK_SIZE if block_size is None else block_size
    if size not in BLOCK_SIZES:
        raise QuantizeError(
            f"block_size is {size!r}", hint=f"give one of {', '.join(str(known) for known in BLOCK_SIZES)}"
        )
    models = {role: model.clone() for role, model in graph.models.items()}
    for model in models.values():
        retie(model)
    weights = {role: find_weights(model) for role, model in models.items()}
    choices = choose_schemes(weights, scheme, keep or {}, raised)
    _check_work(scheme, keep or {}, choices)
    with progress.stage(f"quantize to {scheme}"):
        entries = _apply(choices, moments or {}, size, variants, residual, rounded=rounded, progress=progress)
    for model in models.values():
        model.graph.opset_imports.setdefault(CONTRIB, 1)
    for variant in variants:
        variant.finish(models)
    record = _record(scheme, size, entries)
    if residual is not None:
        record |= {"residual_rank": residual.rank, "residual_layers": len(residual.found)}
    return replace(graph, models=models), record


def _apply(
    choices: Sequence[Choice],
    moments: Moments,
    block_size: int,
    variants: Sequence[Variant],
    residual: Residual | None,
    *,
    rounded: RoundedWeights | None,
    progress: Progress,
) -> list[_Entry]:
    """Rewrite every constant once for each scheme that its uses have, in the order of the nodes."""

    def one_constant(choice: Choice) -> tuple[str, int, str, bool]:
        weight = choice.weight
        return choice.role, order[id(weight.initializer)], choice.scheme, weight.transposed

    order: dict[int, int] = {}
    for choice in choices:
        order.setdefault(id(choice.weight.initializer), len(order))
    groups = [list(group) for _, group in groupby(sorted(choices, key=one_constant), key=one_constant)]
    entries = []
    settings = Settings(block_size, rounded=rounded)
    seen: set[int] = set()
    for done, group in enumerate(groups, start=1):
        entries.append(_apply_group(group, moments, settings, seen, variants=variants, residual=residual))
        progress.advance(done, len(groups))
    return entries


def _apply_group(
    group: Sequence[Choice],
    moments: Moments,
    settings: Settings,
    seen: set[int],
    *,
    variants: Sequence[Variant],
    residual: Residual | None,
) -> _Entry:
    """Rewrite the uses of one constant that share a scheme; `seen` holds constants that were counted before."""
    uses = [choice.weight for choice in group]
    first, scheme = uses[0], group[0].scheme
    bytes_before = 0 if id(first.initializer) in seen else int(first.tensor.nbytes)
    seen.add(id(first.initializer))
    elements = first.elements
    moment = moment_of(uses, moments)
    try:
        stored = load_scheme(scheme).apply(uses, replace(settings, moment=moment))
    except np.linalg.LinAlgError as error:
        raise QuantizeError(
            f"the calibration moments of {first.path} are no second moments: {error}",
            hint="collect them from this base in float32",
        ) from error
    graph = first.initializer.graph
    assert isinstance(graph, ir.Graph)
    for variant in variants:
        variant.take(group[0].role, graph, uses, stored)
    if residual is not None:
        residual.take(uses, stored, moment)
    stored = replace(stored, again=None, error=None)  # they hold the weight
    if scheme != "none":
        drop_unused(graph, first.initializer)
    return _Entry(
        path=first.path,
        kind=first.kind,
        scheme=scheme,
        reason=next((choice.reason for choice in group if choice.reason), ""),
        elements=elements,
        bytes_before=bytes_before,
        stored=stored,
        tied=len({use.kind for use in uses}) > 1,
    )


def _check_work(scheme: str, keep: Mapping[str, str], choices: Sequence[Choice]) -> None:
    if scheme == "none" and not keep:
        return
    if not any(choice.scheme != "none" for choice in choices):
        reasons = sorted({choice.reason for choice in choices if choice.reason})
        found = (
            f"{len(choices)} weights were found and all stay float32 ({'; '.join(reasons)})"
            if choices
            else ("the graph holds no weights of linear layers, embeddings or convolutions")
        )
        raise QuantizeError(f"nothing to quantize to {scheme!r}: {found}", hint="export with --quantize none")


def _record(scheme: str, block_size: int, entries: Sequence[_Entry]) -> dict[str, Any]:
    """Return the JSON-able record: totals, groups of equal treatment, and what is not as asked, with the reason."""

    def treatment(entry: _Entry) -> tuple[str, str, str]:
        return entry.kind, entry.scheme, entry.stored.rounding or ""

    groups = []
    for (kind, name, rounding), members in groupby(sorted(entries, key=treatment), key=treatment):
        group = list(members)
        elements = sum(entry.elements for entry in group)
        stored = sum(entry.stored.bytes for entry in group)
        groups.append(
            {
                "kind": kind,
                "scheme": name,
                "rounding": rounding or None,
                "count": len(group),
                "elements": elements,
                "bytes_before": sum(entry.bytes_before for entry in group),
                "bytes_after": stored,
                "bits_per_weight": round(8 * stored / elements, 3),
            }
        )
    linear = [entry for entry in entries if entry.kind == "linear"]
    return {
        "scheme": scheme,
        "block_size": block_size,
        "calibrated": sum(entry.stored.rounding == "feedback" for entry in entries),
        "bytes_before": sum(entry.bytes_before for entry in entries),
        "bytes_after": sum(entry.stored.bytes for entry in entries),
        "linear_bits_per_weight": _bits(linear),
        "groups": groups,
        "kept": [
            {"path": entry.path, "kind": entry.kind, "scheme": entry.scheme, "reason": entry.reason}
            for entry in entries
            if entry.reason
        ],
        "tied": [entry.path for entry in entries if entry.tied],
    }


def _bits(entries: Sequence[_Entry]) -> float | None:
    elements = sum(entry.elements for entry in entries)
    return round(8 * sum(entry.stored.bytes for entry in entries) / elements, 3) if elements else None
