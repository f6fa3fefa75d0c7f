"""What an export is held to: the original in torch, adapter by adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeadapt.addition import adapter_record
from edgeadapt.errors import QuantizeError
from edgeadapt.fields import to_mapping
from edgeadapt.pipeline.job import TOKENS_PER_TEXT, Array, Job, arrays_of, cases_of
from edgeadapt.progress import Progress
from edgeadapt.quality.calibration import Calibration, samples_of, split
from edgeadapt.runtime.session import Session

if TYPE_CHECKING:
    import torch

    from edgeadapt.merging.originals import LazyOutputs
    from edgeadapt.quality.quality import QualityRow

PARITY_TOLERANCE = 1e-4


def _originals(job: Job, cases: Sequence[Mapping[str, torch.Tensor]]) -> dict[str | None, LazyOutputs]:
    """Return what the bundle must reproduce: the base's outputs under None, or a merged adapter's."""
    from edgeadapt.merging.originals import original_outputs

    if job.recipe.merge:
        assert job.original is not None
        merged = job.adapters[0]
        return {None: original_outputs(job.original, [merged], cases)[merged.name]}
    return original_outputs(job.base, job.adapters, cases)


@dataclass(frozen=True)
class Originals:
    """Inputs, and what the original in torch gives for them by adapter name (None: the base)."""

    cases: Sequence[Mapping[str, Array]]
    outputs: Mapping[str | None, Sequence[Mapping[str, Array]]]


def parity_originals(job: Job) -> Originals:
    """Return what the unquantized graph must give, computed now: torch's weights are not needed beside the graph's."""
    from edgeadapt.export.cases import parity_cases

    cases = parity_cases(job.base, job.samples.texts, reserved=job.prefix_tokens)
    return Originals(arrays_of(cases), {name: list(outputs) for name, outputs in _originals(job, cases).items()})


def parity_of(job: Job, session: Session, originals: Originals) -> dict[str, Any]:
    """Compare the unquantized graph with torch.

    Raises:
        ExportError: if it differs by more than the tolerance.
    """
    from edgeadapt.quality.parity import measure_parity

    result: dict[str, Any] = measure_parity(session, originals.cases, originals.outputs, tolerance=PARITY_TOLERANCE)
    return {**result, "merge": dict(job.merge_record)} if job.merge_record is not None else result


def prune_adapters(job: Job, session: Session, progress: Progress) -> Job:
    """Return the job with adapters that lack the ranks and sites that hardly matter, if the recipe asks for it.

    A prefix has neither, and stays as it is.

    Raises:
        QuantizeError: if an adapter has bottlenecks or other branches.
    """
    if job.recipe.prune_kl is None:
        return job
    with progress.stage("prune adapters"):
        return _pruned(job, session, job.recipe.prune_kl, progress)


def _pruned(job: Job, session: Session, prune_kl: float, progress: Progress) -> Job:
    """Return the job with pruned adapters, and what that cost."""
    from edgeadapt.export.sensitivity import collect_sensitivity
    from edgeadapt.quality.pruning import prune

    for adapter in job.resolved:
        if adapter.bottlenecks:
            raise QuantizeError(
                f"adapter {adapter.name!r} has bottlenecks, which cannot be pruned: only low-rank terms can",
                hint="leave out --prune-kl",
            )
        if adapter.branches:
            raise QuantizeError(
                f"adapter {adapter.name!r} has networks of its own, which cannot be pruned: only low-rank terms can",
                hint="leave out --prune-kl",
            )
    seen, judged = (cases_of(job, part, TOKENS_PER_TEXT) for part in (split(job.samples)[0], job.measured))
    found = {
        adapter.name: prune(session, adapter, collect_sensitivity(job.base, adapter, seen), arrays_of(judged), prune_kl)
        for adapter in job.resolved
        if adapter.prefix is None
    }
    for name, (_, cut) in found.items():
        progress.note(
            f"{name}: {cut.ranks} of {cut.ranks_before} ranks and {cut.sites} of {cut.sites_before} sites are left, "
            f"{cut.parameters} of {cut.parameters_before} parameters; mean KL from the whole adapter {cut.kl:.2g}"
        )
    return dataclasses.replace(
        job,
        resolved=[found[adapter.name][0] if adapter.name in found else adapter for adapter in job.resolved],
        prunings={name: cut for name, (_, cut) in found.items()},
    )


def _measured(job: Job) -> list[tuple[tuple[str | None, ...], Calibration]]:
    """Return the rows of the quality table that share samples: all, unless samples say whose they are."""
    swappable = tuple(resolved.name for resolved in job.swappable)
    # A base whose own head is untrained gives zeros: it equals torch whatever the quantization does.
    names: tuple[str | None, ...] = swappable if job.base.untrained and swappable else (None, *swappable)
    samples = job.measured
    if not samples.adapters:
        return [(names, samples)]
    merged = job.adapters[0].name if job.recipe.merge else None
    return [((name,), samples_of(samples, name or merged)) for name in names]


def quality_rows(job: Job, session: Session, *, only: str | None = None) -> list[QualityRow]:
    """Return the quality table of a written base, or of one adapter merged into it."""
    from edgeadapt.quality.quality import measure_quality

    class_names = {
        resolved.name: adapter_record(adapter, resolved).labels
        for adapter, resolved in zip(job.adapters, job.swappable, strict=False)
    }
    rows: list[QualityRow] = []
    for every, samples in _measured(job):
        names = every if only is None else tuple(name for name in every if name == only)
        if not names:
            continue
        cases = cases_of(job, samples, TOKENS_PER_TEXT)
        originals = {name: outputs for name, outputs in _originals(job, cases).items() if name in names}
        labels = None if samples.adapters and names == (None,) and not job.recipe.merge else samples.labels
        rows += measure_quality(
            session, arrays_of(cases), originals, job.recipe.quantize, labels=labels, class_names=class_names
        )
    return rows


def quality_of(job: Job, session: Session, progress: Progress) -> tuple[dict[str, Any], ...]:
    """Compare the written bundle with torch on the samples; note a ruined model; apply the gate.

    Raises:
        QuantizeError: if the gate's limits are broken.
    """
    return judged(job, quality_rows(job, session), progress)


def judged(job: Job, rows: Sequence[QualityRow], progress: Progress) -> tuple[dict[str, Any], ...]:
    """Note a ruined model, apply the gate, and return the rows as the manifest holds them.

    Raises:
        QuantizeError: if the gate's limits are broken.
    """
    from edgeadapt.quality.gate import gate, verdict

    recipe = job.recipe
    sentence = verdict(rows, calibrated=recipe.calibrate is not None)
    if sentence is not None:
        progress.note(sentence)
    gate(rows, max_kl=recipe.max_kl, min_top1=recipe.min_top1)
    return tuple(to_mapping(row) for row in rows)
