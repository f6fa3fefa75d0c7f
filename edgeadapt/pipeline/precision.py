"""How many bits each weight gets: calibration, and the mix of 4 and 8 bits. And the key-value cache."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgeadapt.errors import QuantizeError, RecipeError
from edgeadapt.pipeline.job import TOKENS_PER_TEXT, Job, arrays_of, cases_of
from edgeadapt.pipeline.measure import quality_rows
from edgeadapt.pipeline.write import open_written, write_base
from edgeadapt.progress import Progress
from edgeadapt.quality.calibration import fitted_samples, samples_of, split
from edgeadapt.recipe import Recipe
from edgeadapt.runtime.session import Session

if TYPE_CHECKING:
    import torch

    from edgeadapt.export.graph import Graph
    from edgeadapt.merging.base_model import BaseModel
    from edgeadapt.quantize.patch import Variant
    from edgeadapt.quantize.residual import Residual
    from edgeadapt.quantize.rounded import RoundedWeights

Array = NDArray[Any]
CALIBRATION_TOKENS_PER_TEXT = 512
CASES_WEIGHED = 32
"""Samples that tell how much each layer matters: an average over a thousand tokens or two is steady enough."""


def quantized(
    job: Job, graph: Graph, variants: Sequence[Variant], trials: Path, progress: Progress
) -> tuple[Graph, dict[str, Any], Residual | None]:
    """Return the graph as the recipe stores it, the record of what was done, and the residual if one is wanted.

    Args:
        job: what is exported.
        graph: in float32, with markers.
        variants: adapters whose merged weights are to be rounded on the same grid; filled.
        trials: a folder for bundles that are measured and removed.
        progress: told of each weight.

    Raises:
        QuantizeError: if the limits cannot be kept, or as `quantize.quantize` does.
    """
    from edgeadapt.quantize.quantize import quantize

    residual = new_residual(job)
    moments = moments_of(job)
    with kept_roundings(job, trials) as rounded:
        raised = choose_mix(job, graph, moments, trials=trials, rounded=rounded, progress=progress)
        smaller, record = quantize(
            graph,
            job.recipe.quantize,
            keep=job.recipe.keep,
            moments=moments,
            block_size=job.recipe.block_size,
            raised=raised,
            variants=variants,
            residual=residual,
            rounded=rounded,
            progress=progress,
        )
    return smaller, record, residual


def mixes(recipe: Recipe) -> bool:
    """Tell whether the recipe's limits choose which layers get 8 bits."""
    return recipe.quantize == "int4" and any(
        limit is not None for limit in (recipe.max_bytes, recipe.max_kl, recipe.min_top1)
    )


@contextmanager
def kept_roundings(job: Job, trials: Path) -> Iterator[RoundedWeights | None]:
    """Give what keeps rounded weights from one trial to the next, on the disk of `trials`; None if none are tried."""
    from edgeadapt.quantize.rounded import RoundedWeights

    if not mixes(job.recipe):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix=".rounded-", dir=trials.parent) as folder:
        yield RoundedWeights(Path(folder))


def moments_of(job: Job) -> Mapping[str, Array] | None:
    """Return second moments of the modules' inputs on the user's samples, None where the scheme does not need them."""
    if not job.calibrates:
        return None
    from edgeadapt.export.activations import collect_moments

    cases, adapted = _calibration_runs(job, CALIBRATION_TOKENS_PER_TEXT)
    return collect_moments(job.base, cases, adapted=adapted)


def _calibration_runs(
    job: Job, tokens_per_text: int
) -> tuple[list[dict[str, torch.Tensor]], list[tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]]]:
    """Return what the base runs on, and each adapter with what it runs on: the weights serve them all."""
    from edgeadapt.merging.reference import adapted_module

    samples = split(job.samples)[0] if job.calibrates else job.samples
    if job.recipe.merge:
        return cases_of(job, fitted_samples(samples, job.adapters[0].name), tokens_per_text), []
    adapted = [
        (adapted_module(job.base, adapter), cases_of(job, fitted_samples(samples, adapter.name), tokens_per_text))
        for adapter in job.adapters
    ]
    return cases_of(job, fitted_samples(samples, None), tokens_per_text), adapted


def check_cache(recipe: Recipe, base: BaseModel) -> None:
    """Refuse a key-value cache in int8 for a model that has none, or one of another kind.

    Raises:
        RecipeError: saying what the model has instead.
    """
    from edgeadapt.export.export import task_of

    if recipe.kv_cache == "float32":
        return
    spec = task_of(base).generation(base)
    what = None
    if spec is None:
        what = f"writes no text (its task is {base.task!r})"
    elif not spec.shared_cache:
        what = "has an encoder: its decoder's cache grows by concatenation, and only GroupQueryAttention's holds int8"
    if what is not None:
        raise RecipeError(f"kv_cache is {recipe.kv_cache!r}, and {base.name} {what}", hint="leave out --kv-cache")


def quantize_cache_of(job: Job, graph: Graph, session: Session, progress: Progress) -> Graph:
    """Return the graph with a key-value cache in int8, if the recipe asks for it.

    Its scales are measured on the samples and on random tokens, with each adapter and without.

    Args:
        job: the export's.
        graph: the unquantized one.
        session: over it; it knows the adapters.
        progress: told of the stage.

    Raises:
        ExportError: if it cannot be known how large keys get at later positions.
        QuantizeError: if the cache is not GroupQueryAttention's.
    """
    if job.recipe.kv_cache == "float32":
        return graph
    with progress.stage("quantize the key-value cache"):
        return _with_quantized_cache(job, graph, session)


def _with_quantized_cache(job: Job, graph: Graph, session: Session) -> Graph:
    from edgeadapt.export.rotary import rotary_partners
    from edgeadapt.quality.cache_ranges import cache_ranges, random_cases
    from edgeadapt.quantize.kv_cache import quantize_cache, scales_of

    samples = split(job.samples)[0]
    merged = job.adapters[0].name if job.recipe.merge else None
    names: list[str | None] = [None, *(adapter.name for adapter in job.swappable)]
    spec = session.require_decoder()
    rest = random_cases(spec.vocab_size, spec.max_length - job.prefix_tokens)
    cases = {
        name: [*arrays_of(cases_of(job, samples_of(samples, name or merged), CALIBRATION_TOKENS_PER_TEXT)), *rest]
        for name in names
    }
    ranges = cache_ranges(session, cases, rotary_partners(job.base, spec.cache_head_dim))
    return quantize_cache(graph, {name: scales_of(largest) for name, largest in ranges.items()})


def new_residual(job: Job) -> Residual | None:
    """Return what collects the residual of the layers that adapters change by a low rank; None if none is wanted.

    Raises:
        QuantizeError: if no adapter changes a layer so: there is no slot that could take it.
    """
    from edgeadapt.quantize.residual import Residual

    if job.recipe.residual_rank is None:
        return None
    paths = frozenset(path for adapter in job.swappable for path, site in adapter.sites.items() if site.rank)
    if not paths:
        raise QuantizeError(
            f"residual_rank is {job.recipe.residual_rank}, and no adapter has a low-rank term at any module: there is "
            "no slot for a residual",
            hint="leave residual_rank out, or export a LoRA adapter too",
        )
    return Residual(job.recipe.residual_rank, paths)


def choose_mix(
    job: Job,
    graph: Graph,
    moments: Mapping[str, Array] | None,
    *,
    trials: Path,
    rounded: RoundedWeights | None,
    progress: Progress,
) -> frozenset[str]:
    """Return the paths of the modules that get 8 bits where int4 gives 4, as the recipe's limits ask for.

    Raises:
        QuantizeError: naming the best that there is, if the limits cannot be kept.
    """
    recipe = job.recipe
    if not mixes(recipe):
        return frozenset()
    from edgeadapt.export.importance import collect_importance
    from edgeadapt.quality.fit import Limits, Worst, fit
    from edgeadapt.quantize.mixed import rank_groups
    from edgeadapt.quantize.quantize import quantize

    @cache
    def measure(raised: frozenset[str]) -> Worst:
        residual = new_residual(job)
        trial, record = quantize(
            graph,
            "int4",
            keep=recipe.keep,
            moments=moments,
            block_size=recipe.block_size,
            raised=raised,
            residual=residual,
            rounded=rounded,
            progress=progress,
        )
        try:
            draft = write_base(job, trial, record, trials, residual)
            with open_written(job, draft, trials, keep_graphs=False) as session:
                worst = Worst.of(quality_rows(job, session))
        finally:
            shutil.rmtree(trials, ignore_errors=True)
        progress.note(f"with {len(raised)} layers raised to 8 bits: {record['bytes_after']} bytes, {worst}")
        return worst

    limits = Limits(recipe.max_bytes, recipe.max_kl, recipe.min_top1)
    if limits.max_bytes is None and limits.keeps(measure(frozenset())):
        return frozenset()
    with progress.stage("weigh layers"):
        cases, adapted = _calibration_runs(job, TOKENS_PER_TEXT)
        few = [(module, own[:CASES_WEIGHED]) for module, own in adapted]
        importance = collect_importance(job.base, cases[:CASES_WEIGHED], adapted=few)
    mix = rank_groups(
        graph,
        importance,
        keep=recipe.keep,
        moments=moments,
        block_size=recipe.block_size,
        rounded=rounded,
        progress=progress,
    )
    return mix.raised(fit(mix, limits, lambda count: measure(mix.raised(count))))
