"""Patches, made while the float base is at hand: each adapter merged, rounded on the base's grid, packed, compared.

`variants_of` says what each adapter would make of the base, `quantize` rounds it beside the base, and `write_patches`
turns that into `patch.bin`, applies it as a device will, and measures the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgeadapt import bundle as bundles
from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate, TargetModule
from edgeadapt.bundle.bundle import Bundle
from edgeadapt.errors import MergeError, QuantizeError
from edgeadapt.progress import Progress
from edgeadapt.quality.gate import verdict
from edgeadapt.quality.quality import QualityRow
from edgeadapt.runtime.opening import open_session
from edgeadapt.runtime.session import Session

if TYPE_CHECKING:
    from edgeadapt.export.graph import Graph
    from edgeadapt.merging.base_model import BaseModel
    from edgeadapt.quantize.patch import FileChange, NewValue, Variant

Array = NDArray[Any]

FAR = 4.0
"""Times the divergence of the adapter beside the base. Rounding once more costs up to 2; a change that is too large for
the base's scales costs hundreds (measured on random models)."""


def variants_of(base: BaseModel, adapters: Sequence[ResolvedAdapter]) -> list[Variant]:
    """Return what `quantize` is to round beside the base: each adapter's merged parameters, computed one at a time."""
    from edgeadapt.quantize.patch import Variant

    variants = []
    for adapter in adapters:
        variant = Variant(adapter.name, {})
        try:
            variant = Variant(adapter.name, _new_values(base, adapter))
        except MergeError as error:
            variant.problem = error.message
        variants.append(variant)
    return variants


def write_patches(
    bundle: Bundle,
    graph: Graph,
    variants: Sequence[Variant],
    *,
    modules: Mapping[str, TargetModule],
    quality: Sequence[QualityRow],
    measure: Callable[[Session, str], list[QualityRow]],
    progress: Progress,
) -> list[QualityRow]:
    """Write the patches of the adapters that can have one, and return the quality rows of their promoted form.

    An adapter whose promoted form is another model has none: its change is too large for the base's scales.

    Args:
        bundle: the written base, its adapters' folders made.
        graph: the quantized base with markers in place; left as it is.
        variants: what `quantize` filled.
        modules: the base's.
        quality: the rows of the adapters beside the base.
        measure: from a session over an adapter's promoted form and its name to its rows.
        progress: told which adapters have no patch, and why.

    Raises:
        QuantizeError: if no adapter can have one.
    """
    rows: list[QualityRow] = []
    promoted = bundle.path / ".promoted"
    for variant in variants:
        try:
            data = _make(bundle, graph, variant, modules, promoted)
            if data is not None:
                with open_session(promoted) as session:
                    found = measure(session, variant.name)
                variant.problem = _ruin(found, [row for row in quality if row.adapter == variant.name])
        finally:
            shutil.rmtree(promoted, ignore_errors=True)
        if data is None or variant.problem is not None:
            progress.note(f"{variant.name} has no patch and cannot be promoted: {variant.problem}")
            continue
        bundles.write_patch(bundle.path, variant.name, data)
        rows += [dataclasses.replace(row, promoted=True) for row in found]
    if not rows:
        problems = "; ".join(f"{variant.name}: {variant.problem}" for variant in variants)
        raise QuantizeError(f"no adapter can have a patch: {problems}", hint="leave patches out")
    return rows


def _ruin(promoted: Sequence[QualityRow], slots: Sequence[QualityRow]) -> str | None:
    """Return what promotion does to an adapter that works beside the base, or None."""
    ruined = verdict(promoted)
    if ruined is None or verdict(slots) is not None or _divergence(promoted) < FAR * _divergence(slots):
        return None
    return f"its change is too large for the base's scales ({ruined.partition(':')[0]})"


def _divergence(rows: Sequence[QualityRow]) -> float:
    """Return how far rows are from the original: the mean KL divergence, or what the cosine lacks of 1."""
    return max(1 - (row.cosine or 0.0) if row.mean_kl is None else row.mean_kl for row in rows)


def _make(
    bundle: Bundle, graph: Graph, variant: Variant, modules: Mapping[str, TargetModule], promoted: Path
) -> bytes | None:
    """Return a patch, its result as a merged bundle at `promoted`; None after setting the variant's problem."""
    from edgeadapt.quantize.pack import pack
    from edgeadapt.quantize.patch import changes

    if variant.problem is not None:
        return None
    packed = promoted / "packed"
    apart = [slot.site for slot in bundle.manifest.slots if "input_gain" in slot.inputs]
    pack(variant.graph(graph), packed, (), modules, apart=apart)
    found = changes(bundle.path, packed, bundle.manifest.graphs)
    if isinstance(found, str):
        variant.problem = found
        return None
    data = _encode(bundle, found)
    shutil.rmtree(packed)
    _write_promoted(bundle, variant.name, data, promoted)
    return data


def _encode(bundle: Bundle, found: Mapping[str, Sequence[FileChange]]) -> bytes:
    writer = bundles.PatchWriter()
    for path, runs in found.items():
        record = bundle.manifest.files[path]
        listed = [bundles.Change(run.offset, run.bits, run.before, run.after) for run in runs]
        writer.add(path, record.size, record.sha256, _digest(bundle.path / path, runs), listed)
    return writer.done()[1]


def _write_promoted(bundle: Bundle, name: str, data: bytes, promoted: Path) -> None:
    """Apply a patch to the base's files as a device does, which checks it, and write a merged bundle."""
    (promoted / "graph").mkdir()
    for content in bundles.patched_contents(bundle, data, f"the patch of {name}"):
        with (promoted / content.path).open("wb") as file:
            deque(map(file.write, content.chunks()), maxlen=0)
    bundles.write_assets(promoted, {asset: bundle.asset(asset) for asset in bundle.asset_names})
    manifest = bundle.manifest
    graphs = {role: dataclasses.replace(graph, slots=None) for role, graph in manifest.graphs.items()}
    merged = dataclasses.replace(manifest, graphs=graphs, slots=(), parameters=(), joined=(), merged=name)
    bundles.write_manifest(promoted, merged)


def _digest(path: Path, runs: Sequence[FileChange]) -> str:
    """Return the SHA-256 of a file with the runs' new bytes in place, without writing it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for run in runs:
            digest.update(file.read(run.offset - file.tell()))
            file.seek(len(run.before), 1)
            digest.update(run.after.data)
        for rest in iter(partial(file.read, 2**22), b""):
            digest.update(rest)
    return digest.hexdigest()


def _new_values(base: BaseModel, adapter: ResolvedAdapter) -> dict[str, NewValue]:
    """Return the parameters that a merge would change, by name.

    Raises:
        MergeError: if a module cannot take its update, or no weight changes.
    """
    from edgeadapt.merging.merge import WEIGHT_TERMS, check_linear, check_site
    from edgeadapt.quantize.patch import NewValue

    if adapter.prefix is not None:
        raise MergeError("it begins texts with virtual tokens and changes no weight", hint="leave patches out")
    check_linear(adapter)
    values: dict[str, NewValue] = {}
    for path, update in adapter.sites.items():
        target = base.modules[path]
        check_site(base, target, update)
        turned = target.type == "conv1d"
        if update.terms.keys() & WEIGHT_TERMS or target.type == "embedding":
            values[f"{path}.weight"] = NewValue(target.weight, _merged(base, target, update, "weight"), turned)
        if target.type != "embedding" and (update.offset is not None or (update.gain is not None and target.has_bias)):
            values[f"{path}.bias"] = NewValue(target.bias, _merged(base, target, update, "bias"))
    for name, value in adapter.replaced.items():
        module = base.modules.get(name.rpartition(".")[0])
        values[name] = NewValue(None, partial(_float32, value), module is not None and module.type == "conv1d")
    return values


def _merged(base: BaseModel, target: TargetModule, update: SiteUpdate, which: str) -> Callable[[], Array]:
    from edgeadapt.merging.merge import site_changes

    return lambda: site_changes(base, target, update)[f"{target.path}.{which}"]


def _float32(value: Array) -> Array:
    return value.astype("float32")
