"""The straight road from trained adapters to a bundle. Read `export_bundle` first."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from edgeadapt import bundle as bundles
from edgeadapt.bundle.bundle import Bundle
from edgeadapt.files import require_free_space, staged_directory
from edgeadapt.memory import give_back
from edgeadapt.patching import variants_of
from edgeadapt.pipeline.inputs import (
    in_order_of,
    load_base,
    merge_adapter,
    named_adapters,
    needed_bytes,
    read_samples,
    resolve_all,
)
from edgeadapt.pipeline.job import Job
from edgeadapt.pipeline.measure import parity_of, parity_originals, prune_adapters, quality_of
from edgeadapt.pipeline.precision import check_cache, quantize_cache_of, quantized
from edgeadapt.pipeline.write import add_patches, copy_of, open_draft, open_written, write_adapters, write_base
from edgeadapt.progress import SILENT, Progress
from edgeadapt.quality.calibration import check_adapters
from edgeadapt.recipe import Recipe

if TYPE_CHECKING:
    from edgeadapt.merging.base_model import BaseModel


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
    from edgeadapt.merging.spool import spool

    with staged_directory(recipe.output, force=recipe.force) as folder:
        with progress.stage("read adapters"):
            adapters = named_adapters(recipe)
        with progress.stage("load base"):
            base, given = load_base(recipe, adapters, base, progress), base is not None
            adapters = in_order_of(base, adapters)
            check_cache(recipe, base)
            resolved = resolve_all(recipe, base, adapters, progress)
            samples = read_samples(recipe, base)
            check_adapters(samples, [adapter.name for adapter in adapters])
            require_free_space(folder, needed_bytes(base))
            rest = give_back if given else spool(base.module, folder)
        job = Job(recipe, base, adapters, resolved, samples, rest=rest)
        if recipe.merge:
            with progress.stage("merge"):
                job = merge_adapter(job)
        graph = export_graph(job.base, replaced=job.replaced, progress=progress)
        with progress.stage("run torch"):
            originals = parity_originals(job)
        with open_draft(job, graph, folder / ".draft") as session:
            with progress.stage("compare with torch"):
                parity = parity_of(job, session, originals)
                del originals
            job = prune_adapters(job, session, progress)
            graph = quantize_cache_of(job, graph, session, progress)
        with progress.stage(f"quantize {recipe.quantize}"):
            variants = variants_of(job.base, job.swappable) if recipe.patches else []
            graph, record, residual = quantized(job, graph, variants, folder / ".trial", progress)
        with progress.stage("write"):
            kept = copy_of(graph) if variants else None
            draft = write_base(job, graph, record, folder, residual)
            del graph, residual
            job.rest()
        with open_written(job, draft, folder, keep_graphs=False) as session:
            with progress.stage("measure quality"):
                quality = quality_of(job, session, progress)
                job.rest()
            with progress.stage("write adapters"):
                adapters_written = write_adapters(job, session, folder)
        if kept is not None:
            with progress.stage("make patches"):
                quality += add_patches(job, Bundle(folder, draft), kept, variants, quality=quality, progress=progress)
        bundles.write_manifest(
            folder, dataclasses.replace(draft, adapters=adapters_written, parity=parity, quality=quality)
        )
    return bundles.open_bundle(recipe.output)
