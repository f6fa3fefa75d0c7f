"""Graphs, adapters and patches into the folder of a bundle."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt import bundle as bundles
from edgeadapt.addition import adapter_record, record_golden
from edgeadapt.bundle.base import base_fingerprint, base_modules
from edgeadapt.bundle.bundle import Bundle
from edgeadapt.bundle.manifest import SCHEMA, AdapterRecord, BaseRecord, Manifest
from edgeadapt.fields import to_mapping
from edgeadapt.patching import write_patches
from edgeadapt.pipeline.job import Job
from edgeadapt.pipeline.measure import judged, quality_rows
from edgeadapt.progress import Progress
from edgeadapt.runtime.opening import open_session
from edgeadapt.runtime.session import Session

if TYPE_CHECKING:
    from edgeadapt.export.graph import Graph
    from edgeadapt.quantize.pack import Packed
    from edgeadapt.quantize.patch import Variant
    from edgeadapt.quantize.residual import Residual

OPSET = 21
MINIMUM_ORT = "1.24.3"
MINIMUM_ORT_FOR_INT8_CACHE = "1.28.0"
"""1.26 refuses int8 keys; 1.27 takes them, and is wrong where q, k and v are joined and there are several rows."""


def copy_of(graph: Graph) -> Graph:
    """Return a copy that can be packed; it shares the weights."""
    return dataclasses.replace(graph, models={role: model.clone() for role, model in graph.models.items()})


@contextmanager
def open_draft(job: Job, graph: Graph, folder: Path) -> Iterator[Session]:
    """Write the unquantized graph, taking adapters as they are, and yield a session over it until it is removed."""
    if not job.recipe.merge:
        job = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, adapter_dtype="float32"))
    draft = write_base(job, copy_of(graph), {"scheme": "none"}, folder)
    job.rest()
    try:
        with open_written(job, draft, folder, keep_graphs=False) as session:
            yield session
    finally:
        shutil.rmtree(folder)
    job.rest()


def open_written(job: Job, draft: Manifest, folder: Path, *, keep_graphs: bool = True) -> Session:
    """Return a session over a written base that knows the job's adapters as they will be stored."""
    session = open_session(folder, keep_graphs=keep_graphs)
    for resolved in job.swappable:
        session.lend(resolved.name, bundles.as_stored(bundles.bind(resolved, draft), draft.adapter_dtype))
    return session


def write_base(
    job: Job, graph: Graph, quantization: Mapping[str, Any], folder: Path, residual: Residual | None = None
) -> Manifest:
    """Write graphs and assets into `folder` with a manifest of a bundle without adapters, and return the manifest."""
    from edgeadapt.quantize.pack import pack

    bundles.write_assets(folder, job.base.assets)
    packed = pack(graph, folder, job.swappable, job.base.modules, flexible=job.flexible)
    manifest = _manifest(job, packed, graph, quantization)
    if residual is not None and residual.found:
        (folder / bundles.RESIDUAL_FILE).write_bytes(bundles.residual_file(residual.found, manifest))
    return bundles.write_manifest(folder, manifest)


def write_adapters(job: Job, session: Session, folder: Path) -> dict[str, AdapterRecord]:
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


def add_patches(
    job: Job,
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
        measure=lambda promoted, name: quality_rows(job, promoted, only=name),
        progress=progress,
    )
    return judged(job, rows, progress)


def _manifest(job: Job, packed: Packed, graph: Graph, quantization: Mapping[str, Any]) -> Manifest:
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
        bottlenecks=packed.bottlenecks,
        branches=packed.branches,
        adapter_dtype=recipe.adapter_dtype or ("float32" if quantization["scheme"] == "none" else "float16"),
        merged=job.adapters[0].name if recipe.merge else None,
        adapters={},
        quantization=quantization,
        parity={},
        quality=(),
        files={},
        runtime={"engine": "onnxruntime", "min_version": _minimum_version(graph), "opset": OPSET},
        generation=_generation(graph, packed),
        labels=_labels(job),
        extra={"untrained": list(base.untrained)} if base.untrained and not recipe.merge else {},
    )


def _minimum_version(graph: Graph) -> str:
    quantized = graph.generation is not None and graph.generation.cache_dtype == "int8"
    return MINIMUM_ORT_FOR_INT8_CACHE if quantized else MINIMUM_ORT


def _generation(graph: Graph, packed: Packed) -> dict[str, Any] | None:
    """Return the manifest's record of a decoder; float32 goes without saying, and readers before int8 know no word."""
    if graph.generation is None:
        return None
    record = to_mapping(dataclasses.replace(graph.generation, cache_scales=packed.cache_scales))
    if graph.generation.cache_dtype == "float32":
        del record["cache_dtype"], record["cache_scales"]
    return record


def _labels(job: Job) -> tuple[str, ...]:
    """Return the class names of the base; of the adapter, if one is merged and has names."""
    if "classification" not in job.base.task:
        return ()
    names = getattr(job.base.config, "id2label", None) or {}
    merged = adapter_record(job.adapters[0], job.resolved[0]).labels if job.recipe.merge else ()
    return merged or tuple(str(names[index]) for index in sorted(names))
