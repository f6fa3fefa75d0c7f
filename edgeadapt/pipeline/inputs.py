"""The start of an export: adapters, their base, samples; or the base that one was merged into."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from edgeadapt.adapters.adapter import Adapter, ResolvedAdapter
from edgeadapt.adapters.factor import dense_sites
from edgeadapt.adapters.inspect import default_head_size, task_of
from edgeadapt.adapters.read import fit_to_base, read_adapters
from edgeadapt.adapters.resolve import resolve
from edgeadapt.bundle.names import check_adapter_name
from edgeadapt.errors import AdapterError, RecipeError
from edgeadapt.pipeline.job import Job
from edgeadapt.progress import Progress
from edgeadapt.quality.calibration import Calibration, built_in, read_calibration
from edgeadapt.recipe import Recipe
from edgeadapt.runtime.chat import render_chat
from edgeadapt.runtime.tokenizer import special_tokens_of

if TYPE_CHECKING:
    from edgeadapt.merging.base_model import BaseModel

MERGE_TOLERANCE = 1e-4
_OLDER_MAP = "special_tokens_map.json"


def named_adapters(recipe: Recipe) -> list[Adapter]:
    """Return the recipe's adapters under the names that they get in the bundle.

    Raises:
        AdapterError: if one cannot be read, or two have one name.
        RecipeError: if names and adapters do not fit.
    """
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


def load_base(recipe: Recipe, adapters: Sequence[Adapter], base: BaseModel | None, progress: Progress) -> BaseModel:
    """Return the recipe's base, loaded for the task that the adapters were trained for; or `base` itself."""
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


def in_order_of(base: BaseModel, adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters with names, rows and axes as the base's."""
    return [fit_to_base(adapter, base.modules, head_dim_of(base)) for adapter in adapters]


def head_dim_of(base: BaseModel) -> int | None:
    """Return the size of a decoder's attention heads, None where its config does not say it."""
    config: Any = getattr(base.module, "config", None)
    given, width, heads = (getattr(config, key, None) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(given, int):
        return given
    return width // heads if isinstance(width, int) and isinstance(heads, int) else None


def resolve_all(
    recipe: Recipe, base: BaseModel, adapters: Sequence[Adapter], progress: Progress
) -> list[ResolvedAdapter]:
    """Return the adapters as arrays at the base's modules, their heads checked; say which will cost as much as it."""
    resolved = [resolve_on(base, adapter) for adapter in adapters]
    for adapter in resolved:
        dense = dense_sites(adapter)
        if dense and not recipe.merge:
            progress.note(
                f"{adapter.name}: its change is no smaller than the base's own weight at {len(dense)} of "
                f"{len(adapter.sites)} modules ({dense[0]} first), so each token costs as much there again; --merge "
                "takes that away, and so does promotion (--patches)"
            )
    check_heads(base, resolved)
    return resolved


def resolve_on(base: BaseModel, adapter: Adapter) -> ResolvedAdapter:
    """Return an adapter as arrays at the base's modules, its library at hand."""
    from edgeadapt.merging.libraries import Libraries

    return resolve(adapter, base.modules, base_name=base.name, library=Libraries(base))


def check_heads(base: BaseModel, resolved: Sequence[ResolvedAdapter]) -> None:
    """Refuse an adapter that leaves a head untrained that the base's checkpoint does not have either."""
    for adapter in resolved:
        missing = [name for name in base.untrained if name not in adapter.replaced]
        if missing:
            raise AdapterError(
                f"adapter {adapter.name!r} brings no {missing[0]}, and {base.name} has none for {base.task}",
                hint="train with modules_to_save for the whole head, or give the task the adapter was trained for",
            )


def read_samples(recipe: Recipe, base: BaseModel) -> Calibration:
    """Return the user's samples, chats written with the base's own template; or the built-in texts."""
    if recipe.calibrate is None:
        return built_in()
    template = base.assets.get("chat_template.jinja")
    if template is None:
        return read_calibration(recipe.calibrate)
    config, older = (json.loads(base.assets.get(name, b"{}")) for name in ("tokenizer_config.json", _OLDER_MAP))
    special = special_tokens_of(config, older)
    return read_calibration(recipe.calibrate, render=partial(render_chat, template.decode(), special_tokens=special))


def needed_bytes(base: BaseModel) -> int:
    """Return how much room an export takes beside what was there, in bytes: the weights, and a bundle in float32."""
    return 2 * 4 * sum(parameter.numel() for parameter in base.module.parameters())


def merge_adapter(job: Job) -> Job:
    """Return the job with the adapter in the base's weights, checked against the unmerged forward."""
    from edgeadapt.export.cases import parity_cases
    from edgeadapt.merging.merge import check_merge, merge
    from edgeadapt.merging.quantized_base import base_for_merge, merge_error_ratio, summary_of_ratios

    adapter, resolved = job.adapters[0], job.resolved[0]
    target = base_for_merge(job.base, adapter, job.recipe.merge_base)
    record: dict[str, Any] = {"adapter": adapter.name, "base": target.quantized_from or "original"}
    if target is not job.base:
        resolved = resolve_on(target, adapter)
        record["nf4_error_to_change"] = summary_of_ratios(merge_error_ratio(job.base, target, resolved))
    merged = merge(target, resolved)
    cases = parity_cases(target, job.samples.texts)
    record["max_relative_error"] = check_merge(target, adapter, merged, cases, MERGE_TOLERANCE)
    return dataclasses.replace(job, base=merged, original=target, resolved=[resolved], merge_record=record)
