"""The straight road from trained adapters to a bundle. Read `export_bundle` first."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgeadapt import bundle as bundles
from edgeadapt.adapters.adapter import Adapter, ResolvedAdapter
from edgeadapt.adapters.inspect import default_head_size, task_of
from edgeadapt.adapters.read import read_adapters
from edgeadapt.adapters.resolve import resolve
from edgeadapt.addition import adapter_record, record_golden
from edgeadapt.bundle.base import base_fingerprint, base_modules
from edgeadapt.bundle.bundle import Bundle
from edgeadapt.bundle.manifest import SCHEMA, AdapterRecord, BaseRecord, Manifest, Pruning
from edgeadapt.bundle.names import check_adapter_name
from edgeadapt.errors import AdapterError, RecipeError
from edgeadapt.fields import to_mapping
from edgeadapt.files import require_free_space, staged_directory
from edgeadapt.patching import variants_of, write_patches
from edgeadapt.progress import SILENT, Progress
from edgeadapt.quality.calibration import Calibration, built_in, check_adapters, read_calibration, samples_of, split
from edgeadapt.recipe import Recipe
from edgeadapt.runtime.chat import render_chat
from edgeadapt.runtime.session import Session, open_session
from edgeadapt.runtime.tokenizer import special_tokens_of

if TYPE_CHECKING:
    import torch

    from edgeadapt.export.graph import Graph
    from edgeadapt.merging.base_model import BaseModel
    from edgeadapt.merging.originals import LazyOutputs
    from edgeadapt.quality.quality import QualityRow
    from edgeadapt.quantize.pack import Packed
    from edgeadapt.quantize.patch import Variant

Array = NDArray[Any]
OPSET = 21
MINIMUM_ORT = "1.24.3"
PARITY_TOLERANCE = 1e-4
MERGE_TOLERANCE = 1e-4
TOKENS_PER_TEXT = 64
CALIBRATION_TOKENS_PER_TEXT = 512
CASES_WEIGHED = 32
"""Samples that tell how much each layer matters: an average over a thousand tokens or two is steady enough."""
_OLDER_MAP = "special_tokens_map.json"


def export_bundle(recipe: Recipe, progress: Progress = SILENT, *, base: BaseModel | None = None) -> Bundle:
    """Turn the recipe's adapters and their base into a bundle, and return it opened.

    Nothing appears at the output before all of it is written, compared with the original in torch, and within the
    gate's limits; a failure or an interrupt leaves what was there before.

    Args:
        recipe: what to export, and how.
        progress: told of each stage.
        base: the base, already loaded (`load_base_model`, `base_from_module`), instead of `recipe.base`.

    Raises:
        EdgeAdaptError: of the class of the stage that failed, with the offending value and the next step.
    """
    from edgeadapt.export.export import export_graph
    from edgeadapt.quantize.quantize import quantize

    with staged_directory(recipe.output, force=recipe.force) as folder:
        with progress.stage("read adapters"):
            adapters = _read_adapters(recipe)
        with progress.stage("load base"):
            base = _load_base(recipe, adapters, base, progress)
            resolved = [resolve(adapter, base.modules, base_name=base.name) for adapter in adapters]
            _check_heads(base, resolved)
            samples = _samples(recipe, base)
            check_adapters(samples, [adapter.name for adapter in adapters])
            require_free_space(folder, _needed_bytes(base, recipe))
        job = _Job(recipe, base, adapters, resolved, samples)
        if recipe.merge:
            with progress.stage("merge"):
                job = _merged(job)
        graph = export_graph(job.base, replaced=job.replaced, progress=progress)
        with _draft_session(job, graph, folder / ".draft") as session:
            with progress.stage("compare with torch"):
                parity = _measure_parity(job, session)
            if recipe.prune_kl is not None:
                with progress.stage("prune adapters"):
                    job = _pruned(job, session, recipe.prune_kl, progress)
        with progress.stage(f"quantize {recipe.quantize}"):
            moments = _moments(job)
            variants = variants_of(job.base, job.swappable) if recipe.patches else []
            raised = _mix(job, graph, moments, folder / ".trial", progress)
            graph, record = quantize(
                graph,
                recipe.quantize,
                keep=recipe.keep,
                moments=moments,
                block_size=recipe.block_size,
                raised=raised,
                variants=variants,
                progress=progress,
            )
        with progress.stage("write"):
            kept = _copy(graph) if variants else graph
            draft = _write_base(job, graph, record, folder)
        with _session(job, draft, folder) as session:
            with progress.stage("measure quality"):
                quality = _measure_quality(job, session, progress)
            with progress.stage("write adapters"):
                adapters_written = _write_adapters(job, session, folder)
        if variants:
            with progress.stage("make patches"):
                quality += _write_patches(
                    job, Bundle(folder, draft), kept, variants, quality=quality, progress=progress
                )
        bundles.write_manifest(
            folder, dataclasses.replace(draft, adapters=adapters_written, parity=parity, quality=quality)
        )
    return bundles.open_bundle(recipe.output)


@dataclass(frozen=True)
class _Job:
    """What every stage reads. After a merge: the merged base, its adapter only as the reference."""

    recipe: Recipe
    base: BaseModel
    adapters: Sequence[Adapter]
    resolved: Sequence[ResolvedAdapter]
    samples: Calibration
    original: BaseModel | None = None
    merge_record: Mapping[str, Any] | None = None
    prunings: Mapping[str, Pruning] = field(default_factory=dict)

    @property
    def measured(self) -> Calibration:
        """The samples of the quality table: none that the quantization was calibrated on, where there are enough."""
        return split(self.samples)[1] if self.calibrates else self.samples

    @property
    def calibrates(self) -> bool:
        """Whether the quantization is fitted to samples: the user's, or the built-in texts for a model of text."""
        return self.recipe.quantize == "int4" and (self.recipe.calibrate is not None or _reads_text(self))

    @property
    def swappable(self) -> Sequence[ResolvedAdapter]:
        """The adapters that get slots."""
        return () if self.recipe.merge else self.resolved

    @property
    def replaced(self) -> tuple[str, ...]:
        """Parameters that adapters replace whole."""
        return tuple(sorted({name for adapter in self.swappable for name in adapter.replaced}))

    @property
    def flexible(self) -> tuple[str, ...]:
        """Replaced parameters whose class count may differ between adapters: heads that the base does not have."""
        parameters = dict(self.base.module.named_parameters(remove_duplicate=False))
        return tuple(
            name
            for name in self.replaced
            if name in self.base.untrained
            or any(
                tuple(parameters[name].shape) != a.replaced[name].shape for a in self.swappable if name in a.replaced
            )
        )


def _read_adapters(recipe: Recipe) -> list[Adapter]:
    found = [adapter for path in recipe.adapters for adapter in read_adapters(path)]
    if recipe.names:
        if len(recipe.names) != len(found):
            raise RecipeError(
                f"{len(recipe.names)} names for {len(found)} adapters: {', '.join(a.name for a in found)}",
                hint="give one --name per adapter, in their order",
            )
        found = [dataclasses.replace(a, name=name) for a, name in zip(found, recipe.names, strict=True)]
    if recipe.merge and len(found) > 1:
        raise RecipeError(
            f"{recipe.adapters[0]} holds {len(found)} adapters, and merge takes one",
            hint="give the folder of one of them",
        )
    names = [adapter.name for adapter in found]
    for index, name in enumerate(names):
        check_adapter_name(name, names[:index])
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AdapterError(f"two adapters have the name {twice[0]!r}", hint="give each its own with --name")
    return found


def _load_base(recipe: Recipe, adapters: Sequence[Adapter], base: BaseModel | None, progress: Progress) -> BaseModel:
    from edgeadapt.merging.load import load_base_model

    if base is None:
        if recipe.base is None:
            raise RecipeError("base is missing", hint="give a folder, a GGUF file or a hub id")
        tasks = {task for task in map(task_of, adapters) if task is not None}
        if recipe.task is None and len(tasks) > 1:
            raise AdapterError(
                f"the adapters were trained for different tasks: {', '.join(sorted(tasks))}",
                hint="export one bundle per task, or pass --task",
            )
        sizes = [size for size in map(default_head_size, adapters) if size is not None]
        base = load_base_model(
            recipe.base,
            task=recipe.task or next(iter(tasks), None),
            num_labels=sizes[0] if sizes else None,
            revision=recipe.revision,
        )
    for adapter in adapters:
        for warning in adapter.warnings:
            progress.note(f"{adapter.name}: {warning}")
    if recipe.max_length is None:
        return base
    return dataclasses.replace(base, max_length=recipe.max_length)


def _check_heads(base: BaseModel, resolved: Sequence[ResolvedAdapter]) -> None:
    """Refuse an adapter that leaves a head untrained that the base's checkpoint does not have either."""
    for adapter in resolved:
        missing = [name for name in base.untrained if name not in adapter.replaced]
        if missing:
            raise AdapterError(
                f"adapter {adapter.name!r} brings no {missing[0]}, and {base.name} has none for {base.task}",
                hint="train with modules_to_save for the whole head, or give the task the adapter was trained for",
            )


def _samples(recipe: Recipe, base: BaseModel) -> Calibration:
    """Return the user's samples, chats written with the base's own template; or the built-in texts."""
    if recipe.calibrate is None:
        return built_in()
    template = base.assets.get("chat_template.jinja")
    if template is None:
        return read_calibration(recipe.calibrate)
    config, older = (json.loads(base.assets.get(name, b"{}")) for name in ("tokenizer_config.json", _OLDER_MAP))
    special = special_tokens_of(config, older)
    return read_calibration(recipe.calibrate, render=partial(render_chat, template.decode(), special_tokens=special))


def _needed_bytes(base: BaseModel, recipe: Recipe) -> int:
    float_bytes = 4 * sum(parameter.numel() for parameter in base.module.parameters())
    return 2 * float_bytes if recipe.quantize != "none" else float_bytes


def _merged(job: _Job) -> _Job:
    """Return the job with the adapter in the base's weights, checked against the unmerged forward."""
    from edgeadapt.export.cases import parity_cases
    from edgeadapt.merging.merge import check_merge, merge
    from edgeadapt.merging.quantized_base import base_for_merge, merge_error_ratio, summary_of_ratios

    adapter, resolved = job.adapters[0], job.resolved[0]
    target = base_for_merge(job.base, adapter, job.recipe.merge_base)
    record: dict[str, Any] = {"adapter": adapter.name, "base": target.quantized_from or "original"}
    if target is not job.base:
        resolved = resolve(adapter, target.modules, base_name=target.name)
        record["nf4_error_to_change"] = summary_of_ratios(merge_error_ratio(job.base, target, resolved))
    merged = merge(target, resolved)
    cases = parity_cases(target, job.samples.texts)
    record["max_relative_error"] = check_merge(target, adapter, merged, cases, MERGE_TOLERANCE)
    return dataclasses.replace(job, base=merged, original=target, resolved=[resolved], merge_record=record)


def _originals(job: _Job, cases: Sequence[Mapping[str, torch.Tensor]]) -> dict[str | None, LazyOutputs]:
    """Return what the bundle must reproduce: the base's outputs under None, or a merged adapter's."""
    from edgeadapt.merging.originals import original_outputs

    if job.recipe.merge:
        assert job.original is not None
        merged = job.adapters[0]
        return {None: original_outputs(job.original, [merged], cases)[merged.name]}
    return original_outputs(job.base, job.adapters, cases)


def _arrays(cases: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, Array]]:
    return [{name: tensor.numpy() for name, tensor in case.items()} for case in cases]


def _copy(graph: Graph) -> Graph:
    """Return a copy that can be packed; it shares the weights."""
    return dataclasses.replace(graph, models={role: model.clone() for role, model in graph.models.items()})


@contextmanager
def _draft_session(job: _Job, graph: Graph, folder: Path) -> Iterator[Session]:
    """Write the unquantized graph, taking adapters as they are, and yield a session over it until it is removed."""
    if not job.recipe.merge:
        job = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, adapter_dtype="float32"))
    draft = _write_base(job, _copy(graph), {"scheme": "none"}, folder)
    try:
        with _session(job, draft, folder, keep_graphs=False) as session:
            yield session
    finally:
        shutil.rmtree(folder)


def _measure_parity(job: _Job, session: Session) -> dict[str, Any]:
    """Compare the unquantized graph with torch.

    Raises:
        ExportError: if it differs by more than the tolerance.
    """
    from edgeadapt.export.cases import parity_cases
    from edgeadapt.quality.parity import measure_parity

    cases = parity_cases(job.base, job.samples.texts)
    result: dict[str, Any] = measure_parity(session, _arrays(cases), _originals(job, cases), tolerance=PARITY_TOLERANCE)
    return {**result, "merge": dict(job.merge_record)} if job.merge_record is not None else result


def _pruned(job: _Job, session: Session, prune_kl: float, progress: Progress) -> _Job:
    """Return the job with adapters that lack the ranks and sites that hardly matter, and what that cost."""
    from edgeadapt.export.cases import sample_cases
    from edgeadapt.export.sensitivity import collect_sensitivity
    from edgeadapt.quality.pruning import prune

    seen, judged = (sample_cases(job.base, part.texts, part.arrays) for part in (split(job.samples)[0], job.measured))
    found = {
        adapter.name: prune(session, adapter, collect_sensitivity(job.base, adapter, seen), _arrays(judged), prune_kl)
        for adapter in job.resolved
    }
    for name, (_, cut) in found.items():
        progress.note(
            f"{name}: {cut.ranks} of {cut.ranks_before} ranks and {cut.sites} of {cut.sites_before} sites are left, "
            f"{cut.parameters} of {cut.parameters_before} parameters; mean KL from the whole adapter {cut.kl:.2g}"
        )
    return dataclasses.replace(
        job,
        resolved=[found[adapter.name][0] for adapter in job.resolved],
        prunings={name: cut for name, (_, cut) in found.items()},
    )


def _session(job: _Job, draft: Manifest, folder: Path, *, keep_graphs: bool = True) -> Session:
    """Return a session over a written base that knows the job's adapters as they will be stored."""
    session = open_session(folder, keep_graphs=keep_graphs)
    for resolved in job.swappable:
        session.lend(resolved.name, bundles.as_stored(bundles.bind(resolved, draft), draft.adapter_dtype))
    return session


def _moments(job: _Job) -> Mapping[str, Array] | None:
    """Return second moments of the modules' inputs on the user's samples, None where the scheme does not need them."""
    if not job.calibrates:
        return None
    from edgeadapt.export.activations import collect_moments

    cases, adapted = _calibration_runs(job, CALIBRATION_TOKENS_PER_TEXT)
    return collect_moments(job.base, cases, adapted=adapted)


def _calibration_runs(
    job: _Job, tokens_per_text: int
) -> tuple[list[dict[str, torch.Tensor]], list[tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]]]:
    """Return what the base runs on, and each adapter with what it runs on: the weights serve them all."""
    from edgeadapt.merging.reference import adapted_module

    samples = split(job.samples)[0] if job.calibrates else job.samples
    if job.recipe.merge:
        return _cases(job, samples_of(samples, job.adapters[0].name), tokens_per_text), []
    adapted = [
        (adapted_module(job.base, adapter), _cases(job, samples_of(samples, adapter.name), tokens_per_text))
        for adapter in job.adapters
    ]
    return _cases(job, samples_of(samples, None), tokens_per_text), adapted


def _mix(
    job: _Job, graph: Graph, moments: Mapping[str, Array] | None, folder: Path, progress: Progress
) -> frozenset[str]:
    """Return the paths of the modules that get 8 bits where int4 gives 4, as `max_bytes` and `max_kl` ask for.

    Raises:
        QuantizeError: naming the best that there is, if the limits cannot be kept.
    """
    recipe = job.recipe
    if recipe.quantize != "int4" or (recipe.max_bytes is None and recipe.max_kl is None):
        return frozenset()
    from edgeadapt.export.importance import collect_importance
    from edgeadapt.quality.fit import fit
    from edgeadapt.quantize.mixed import rank_groups
    from edgeadapt.quantize.quantize import quantize

    with progress.stage("weigh layers"):
        cases, adapted = _calibration_runs(job, TOKENS_PER_TEXT)
        few = [(module, own[:CASES_WEIGHED]) for module, own in adapted]
        importance = collect_importance(job.base, cases[:CASES_WEIGHED], adapted=few)
    mix = rank_groups(
        graph, importance, keep=recipe.keep, moments=moments, block_size=recipe.block_size, progress=progress
    )

    def measure(count: int) -> float:
        trial, record = quantize(
            graph,
            "int4",
            keep=recipe.keep,
            moments=moments,
            block_size=recipe.block_size,
            raised=mix.raised(count),
            progress=progress,
        )
        try:
            draft = _write_base(job, trial, record, folder)
            with _session(job, draft, folder, keep_graphs=False) as session:
                worst = max((row.mean_kl or 0.0 for row in _quality_rows(job, session)), default=0.0)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        progress.note(f"{count} of {len(mix.groups)} groups in 8 bits: {mix.bytes(count)} bytes, mean KL {worst:.4g}")
        return worst

    return mix.raised(fit(mix, max_bytes=recipe.max_bytes, max_kl=recipe.max_kl, measure=measure))


def _reads_text(job: _Job) -> bool:
    """Return whether texts are all that the model needs to run on: no pixels or sounds, which would be noise."""
    if "tokenizer.json" not in job.base.assets or not job.samples.texts:
        return False
    cases = _cases(job, dataclasses.replace(job.samples, texts=job.samples.texts[:1]), 1)
    return not any(tensor.is_floating_point() for case in cases for tensor in case.values())


def _cases(job: _Job, samples: Calibration, tokens_per_text: int) -> list[dict[str, torch.Tensor]]:
    from edgeadapt.export.cases import sample_cases

    return sample_cases(job.base, samples.texts, samples.arrays, tokens_per_text=tokens_per_text)


def _write_base(job: _Job, graph: Graph, quantization: Mapping[str, Any], folder: Path) -> Manifest:
    """Write graphs and assets into `folder` with a manifest of a bundle without adapters, and return the manifest."""
    from edgeadapt.quantize.pack import pack

    bundles.write_assets(folder, job.base.assets)
    packed = pack(graph, folder, job.swappable, job.base.modules, flexible=job.flexible)
    return bundles.write_manifest(folder, _manifest(job, packed, graph, quantization))


def _write_adapters(job: _Job, session: Session, folder: Path) -> dict[str, AdapterRecord]:
    """Write every adapter with its golden, recorded now, and return their records.

    Raises:
        BundleError: if an adapter does nothing.
    """
    manifest = session.bundle.manifest
    return {
        resolved.name: bundles.write_adapter(
            folder,
            resolved.name,
            bundles.bind(resolved, manifest),
            dataclasses.replace(adapter_record(adapter, resolved), pruned=job.prunings.get(resolved.name)),
            record_golden(session, resolved.name),
            manifest.adapter_dtype,
            base_fingerprint=manifest.base.fingerprint,
        )
        for adapter, resolved in zip(job.adapters, job.swappable, strict=False)
    }


def _write_patches(
    job: _Job,
    bundle: Bundle,
    graph: Graph,
    variants: Sequence[Variant],
    *,
    quality: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> tuple[dict[str, Any], ...]:
    """Write the patches of the adapters that can have one, and return the quality of their promoted form.

    Raises:
        QuantizeError: if no adapter can have one, or the gate's limits are broken.
    """
    from edgeadapt.quality.quality import QualityRow

    rows = write_patches(
        bundle,
        graph,
        variants,
        modules=job.base.modules,
        quality=[QualityRow(**row) for row in quality],
        measure=lambda promoted, name: _quality_rows(job, promoted, only=name),
        progress=progress,
    )
    return _judged(job, rows, progress)


def _manifest(job: _Job, packed: Packed, graph: Graph, quantization: Mapping[str, Any]) -> Manifest:
    base, recipe = job.base, job.recipe
    return Manifest(
        schema=SCHEMA,
        name=recipe.output.name.removesuffix(".bundle"),
        task=base.task,
        base=BaseRecord(
            name=base.name,
            revision=base.revision,
            model_type=base.model_type,
            quantized_from=base.quantized_from,
            fingerprint=base_fingerprint(base.modules),
            modules=base_modules(base.modules),
        ),
        graphs=packed.graphs,
        slots=packed.slots,
        parameters=packed.parameters,
        joined=packed.joined,
        adapter_dtype=recipe.adapter_dtype or ("float32" if quantization["scheme"] == "none" else "float16"),
        merged=job.adapters[0].name if recipe.merge else None,
        adapters={},
        quantization=quantization,
        parity={},
        quality=(),
        files={},
        runtime={"engine": "onnxruntime", "min_version": MINIMUM_ORT, "opset": OPSET},
        generation=None if graph.generation is None else to_mapping(graph.generation),
        labels=_labels(job),
        extra={"untrained": list(base.untrained)} if base.untrained and not recipe.merge else {},
    )


def _labels(job: _Job) -> tuple[str, ...]:
    """Return the class names of the base; of the adapter, if one is merged and has names."""
    if "classification" not in job.base.task:
        return ()
    names = getattr(job.base.config, "id2label", None) or {}
    merged = adapter_record(job.adapters[0], job.resolved[0]).labels if job.recipe.merge else ()
    return merged or tuple(str(names[index]) for index in sorted(names))


def _measured(job: _Job) -> list[tuple[tuple[str | None, ...], Calibration]]:
    """Return the rows of the quality table that share samples: all, unless samples say whose they are."""
    swappable = tuple(resolved.name for resolved in job.swappable)
    # A base whose own head is untrained gives zeros: it equals torch whatever the quantization does.
    names: tuple[str | None, ...] = swappable if job.base.untrained and swappable else (None, *swappable)
    samples = job.measured
    if not samples.adapters:
        return [(names, samples)]
    merged = job.adapters[0].name if job.recipe.merge else None
    return [((name,), samples_of(samples, name or merged)) for name in names]


def _quality_rows(job: _Job, session: Session, *, only: str | None = None) -> list[QualityRow]:
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
        cases = _cases(job, samples, TOKENS_PER_TEXT)
        originals = {name: outputs for name, outputs in _originals(job, cases).items() if name in names}
        labels = None if samples.adapters and names == (None,) and not job.recipe.merge else samples.labels
        rows += measure_quality(
            session, _arrays(cases), originals, job.recipe.quantize, labels=labels, class_names=class_names
        )
    return rows


def _measure_quality(job: _Job, session: Session, progress: Progress) -> tuple[dict[str, Any], ...]:
    """Compare the written bundle with torch on the samples; note a ruined model; apply the gate.

    Raises:
        QuantizeError: if the gate's limits are broken.
    """
    return _judged(job, _quality_rows(job, session), progress)


def _judged(job: _Job, rows: Sequence[QualityRow], progress: Progress) -> tuple[dict[str, Any], ...]:
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
