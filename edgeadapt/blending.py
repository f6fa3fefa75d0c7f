"""One more adapter for a bundle that exists, made of those that are in it, without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeadapt import bundle as bundles
from edgeadapt.adapters.adapter import ResolvedAdapter
from edgeadapt.addition import head_size, record_golden, tell_of_no_patch
from edgeadapt.bundle.bind import unbind
from edgeadapt.bundle.blend import blend
from edgeadapt.bundle.bottlenecks import width_of
from edgeadapt.bundle.bundle import Bundle
from edgeadapt.bundle.combine import Part, combine, relative_error, settings_of
from edgeadapt.bundle.manifest import AdapterRecord, Blend, BlendPart
from edgeadapt.bundle.names import check_adapter_name
from edgeadapt.errors import BundleError
from edgeadapt.progress import SILENT, Progress
from edgeadapt.runtime.opening import open_session


def blend_adapters(
    bundle: Bundle | Path | str,
    weights: Mapping[str, float],
    *,
    name: str,
    method: str = "cat",
    density: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Make an adapter of others in a bundle, add it, and return the bundle opened anew.

    `manifest.adapters[name].blend` says of what and how it was made, and how far it is from the exact weighted sum.

    Args:
        bundle: a bundle's folder, or what `open_bundle` returned.
        weights: of each adapter, by name; negative ones subtract.
        name: the new adapter's.
        method: one of `edgeadapt.bundle.combine.METHODS`, where they are defined; "cat" is exact.
        density: the share of numbers that pruning methods keep, 0.5 if None.
        rank: the largest rank at any module for svd and pruning methods, None for the adapters' largest there.
        seed: of what the dare methods drop, 0 if None.
        force: replace an adapter of the same name.
        progress: told of each stage.

    Raises:
        BundleError: there is no such adapter or method, the name is taken, or what they set cannot be combined so.
    """
    settings = settings_of(method, density=density, rank=rank, seed=seed)
    opened = bundle if isinstance(bundle, Bundle) else bundles.open_bundle(Path(bundle))
    with progress.stage("read the adapters"):
        _check_name(opened, name, force=force)
        if not weights:
            raise BundleError("a blend needs at least one adapter", hint="name adapters of the bundle: A=0.7 B=0.3")
        parts = [Part(key, weight, opened.adapter_tensors(key)) for key, weight in weights.items()]
    with progress.stage("blend"):
        tensors, rank_error = combine(parts, opened.manifest, settings, progress.advance)
        stored = bundles.as_stored(tensors, opened.manifest.adapter_dtype)
        exact = blend([(part.weight, part.inputs) for part in parts], opened.manifest)
        error = relative_error(stored, exact, opened.manifest)
        sources = [BlendPart(part.name, part.weight, _digest(opened, part.name)) for part in parts]
        made = Blend(tuple(sources), error=error, rank_error=rank_error, **dataclasses.asdict(settings))
        record = _record(opened, unbind(name, tensors, opened.manifest), made)
    with progress.stage("record golden outputs"), open_session(opened) as session:
        session.lend(name, stored)
        golden = record_golden(session, name)
    with progress.stage("write"):
        changed = bundles.insert_adapter(opened, name, tensors, record, golden, replace=force)
    tell_of_no_patch(opened, name, progress)
    return changed


def _check_name(bundle: Bundle, name: str, *, force: bool) -> None:
    hint = "choose another name with --as"
    try:
        check_adapter_name(name, bundle.adapter_names)
    except BundleError as error:
        raise BundleError(error.message, hint=hint) from error
    if name in bundle.adapter_names and not force:
        raise BundleError(f"{bundle.path} already has an adapter {name!r}", hint=f"{hint}, or pass --force")


def _digest(bundle: Bundle, name: str) -> str:
    return bundle.manifest.files[f"adapters/{name}/adapter.onnx_adapter"].sha256


def _record(bundle: Bundle, resolved: ResolvedAdapter, made: Blend) -> AdapterRecord:
    """Return what the manifest says of a blend, before its golden is measured."""
    names = [part.adapter for part in made.parts]
    records = [bundle.adapter_record(name) for name in names]
    kinds = {record.kind for record in records}
    stamped = all(record.base_checked == "stamp" for record in records)
    return AdapterRecord(
        kind=kinds.pop() if len(kinds) == 1 else "blend",
        rank=max((*(update.rank for update in resolved.sites.values()), width_of(resolved.bottlenecks), 0)),
        parameters=resolved.parameter_count,
        minimum_effect=0.0,
        tolerance=0.0,
        base_checked="stamp" if stamped else "shapes",
        labels=_labels(bundle, resolved, names),
        blend=made,
    )


def _labels(bundle: Bundle, resolved: ResolvedAdapter, names: Sequence[str]) -> tuple[str, ...]:
    """Return the class names that the adapters agree on; else a head's own numbers, not the names of one of them."""
    if len({bundle.labels_of(name) for name in names}) == 1:
        return bundle.adapter_record(names[0]).labels
    return tuple(f"LABEL_{index}" for index in range(head_size(resolved) or 0))
