"""Changing and checking a bundle that exists, without torch: add an adapter, remove one, verify all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt import bundle as bundles
from edgeadapt.adapters.adapter import Adapter, Library, ResolvedAdapter, TargetModule
from edgeadapt.adapters.labels import read_labels
from edgeadapt.adapters.read import fit_to_base, read_adapters
from edgeadapt.adapters.resolve import resolve
from edgeadapt.bundle.base import base_fingerprint, target_modules
from edgeadapt.bundle.bottlenecks import width_of
from edgeadapt.bundle.bundle import Bundle
from edgeadapt.bundle.golden import Golden
from edgeadapt.bundle.manifest import AdapterRecord, Manifest
from edgeadapt.bundle.names import check_adapter_name
from edgeadapt.bundle.verify import Finding
from edgeadapt.errors import AdapterError, BundleError, EdgeAdaptError
from edgeadapt.progress import SILENT, Progress
from edgeadapt.runtime.opening import open_session
from edgeadapt.runtime.session import Session

Array = NDArray[Any]

GOLDEN_TOKENS = 8
GOLDEN_SAMPLES = 8000
"""Of raw sound at 16 kHz. Encoders of speech shorten it by convolutions, so few samples come to nothing."""
# Another processor adds float32 in another order; quantized kernels round activations differently on each kind.
TOLERANCE = {"none": 1e-3, "fp16": 1e-3}
QUANTIZED_TOLERANCE = 0.05
# Ten times the noise of float32 sums: whatever is below does nothing that anyone could notice.
SMALLEST_EFFECT = 1e-5


def add_adapter(
    bundle: Bundle | Path | str,
    adapter: Path | str,
    *,
    name: str | None = None,
    base: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Add an adapter to a bundle and return the bundle opened anew. Without `base`, torch is not needed.

    The adapter is read, checked complete against the base's modules in the manifest, bound to the bundle's slots, run
    once to record its golden outputs, and written. An adapter that changes nothing is refused.

    Args:
        bundle: a bundle's folder, or what `open_bundle` returned.
        adapter: the adapter's folder, holding one adapter.
        name: its name in the bundle, None for the folder's.
        base: the base it was trained on, for kinds that need the base's weights (DoRA, trained biases, prompts).
        force: replace an adapter of the same name.
        progress: told of each stage.

    Raises:
        AdapterError: if the adapter is damaged or does not fit the base.
        BundleError: if the bundle has no slot for it, the name is taken, or it does nothing.
    """
    opened = bundle if isinstance(bundle, Bundle) else bundles.open_bundle(Path(bundle))
    manifest = opened.manifest
    with progress.stage("read the adapter"):
        bundles.check_takes_adapters(manifest)
        found = one_adapter(Path(adapter), name)
        check_adapter_name(found.name, manifest.adapters)
        if found.name in manifest.adapters and not force:
            raise BundleError(
                f"{opened.path} already has an adapter {found.name!r}", hint="choose another --name, or pass --force"
            )
        modules, library = (target_modules(manifest), None) if base is None else _at_work(base, manifest)
        found = fit_to_base(found, modules, (manifest.generation or {}).get("cache_head_dim"))
        resolved = resolve(found, modules, base_name=manifest.base.name, library=library)
        tensors = bundles.bind(resolved, manifest)
        record = adapter_record(found, resolved)
    with progress.stage("record golden outputs"), open_session(opened) as session:
        session.lend(found.name, bundles.as_stored(tensors, manifest.adapter_dtype))
        golden = record_golden(session, found.name)
    with progress.stage("write"):
        changed = bundles.insert_adapter(opened, found.name, tensors, record, golden, replace=force)
    tell_of_no_patch(opened, found.name, progress)
    return changed


def tell_of_no_patch(bundle: Bundle, name: str, progress: Progress) -> None:
    """Say that a new adapter has no patch, where others of the bundle have one."""
    if any(bundle.has_patch(other) for other in bundle.adapter_names):
        progress.note(f"{name} has no patch and cannot be promoted: only an export makes patches, from the float base")


def remove_adapter(bundle: Bundle | Path | str, name: str, *, progress: Progress = SILENT) -> Bundle:
    """Remove adapter `name` and return the bundle opened anew.

    Raises:
        BundleError: if there is no such adapter.
    """
    opened = bundle if isinstance(bundle, Bundle) else bundles.open_bundle(Path(bundle))
    with progress.stage("remove"):
        return bundles.remove_adapter(opened, name)


def verify_bundle(bundle: Path | str, *, progress: Progress = SILENT) -> list[Finding]:
    """Return everything that is wrong with a bundle: its files, then each adapter's golden run here. Empty is sound."""
    opened = bundles.open_bundle(Path(bundle), check_files=False)
    with progress.stage("check files"):
        findings = bundles.verify_files(opened)
    if findings:
        return findings
    with progress.stage("run goldens"), open_session(opened) as session:
        for name in opened.adapter_names:
            problem = _golden_problem(session, name, opened.golden(name))
            if problem is not None:
                findings.append(Finding(f"adapters/{name}/golden.safetensors", problem))
    return findings


def one_adapter(path: Path, name: str | None) -> Adapter:
    """Return the only adapter at `path`, renamed to `name` if given.

    Raises:
        AdapterError: if the folder holds several adapters.
    """
    found = read_adapters(path)
    if len(found) > 1:
        raise AdapterError(
            f"{path} holds {len(found)} adapters: {', '.join(adapter.name for adapter in found)}",
            hint="give the folder of one of them",
        )
    return found[0] if name is None else dataclasses.replace(found[0], name=name)


def adapter_record(adapter: Adapter, resolved: ResolvedAdapter) -> AdapterRecord:
    """Return what a manifest says of an adapter, before its golden is measured.

    Raises:
        AdapterError: if its labels.json does not fit its head.
    """
    stamped = adapter.base.fingerprint is not None
    return AdapterRecord(
        kind=adapter.kind,
        rank=max((*(update.rank for update in resolved.sites.values()), width_of(resolved.bottlenecks), 0)),
        parameters=resolved.parameter_count,
        minimum_effect=0.0,
        tolerance=0.0,
        base_checked="stamp" if stamped else "shapes",
        labels=read_labels(adapter, head_size(resolved)),
        prefix_tokens=0 if resolved.prefix is None else resolved.prefix.tokens,
    )


def head_size(resolved: ResolvedAdapter) -> int | None:
    """Return the number of classes of the head that an adapter brings, None if it brings none."""
    matrices = [value for name, value in resolved.replaced.items() if name.endswith(".weight") and value.ndim == 2]
    return int(matrices[-1].shape[0]) if matrices else None


def record_golden(session: Session, name: str) -> Golden:
    """Return the golden of an adapter that the session knows: its outputs and the base's, measured now.

    Raises:
        BundleError: if the adapter does nothing, or its outputs are not finite.
    """
    manifest = session.bundle.manifest
    inputs = golden_inputs(session)
    session.use(None)
    base = golden_outputs(session, inputs)
    session.use(name)
    adapted = golden_outputs(session, inputs)
    idle = None
    if bundles.has_residual(manifest):
        session.use({name: 0.0})  # what is left is the residual
        idle = golden_outputs(session, inputs)
    session.use(None)
    tolerance = TOLERANCE.get(str(manifest.quantization.get("scheme", "none")), QUANTIZED_TOLERANCE)
    if session.spec is not None and session.spec.cache_dtype != "float32":
        tolerance = QUANTIZED_TOLERANCE  # a key that lies between two codes may fall to either
    limits = {"tolerance": tolerance, "smallest_effect": SMALLEST_EFFECT}
    return bundles.make_golden(name, inputs, base, adapted, idle=idle, **limits)


def golden_inputs(session: Session) -> dict[str, Array]:
    """Return inputs for a golden: a short text of fixed token ids, or fixed random pictures or features."""
    manifest = session.bundle.manifest
    generator = np.random.default_rng(0)
    vocabulary = _vocabulary(manifest)
    wanted = dict(session.inputs("encoder" if session.has_encoder else None))
    inputs: dict[str, Array] = {}
    for name, info in wanted.items():
        if name.startswith("past_key_values."):
            continue
        shape = tuple(axis if isinstance(axis, int) else _free_axis(name, i) for i, axis in enumerate(info.shape))
        if name == "input_ids":
            inputs[name] = generator.integers(1, vocabulary, shape, dtype=np.int64)
        elif np.issubdtype(info.dtype, np.integer):
            inputs[name] = np.full(shape, 1 if "mask" in name else 0, info.dtype)
        else:
            inputs[name] = generator.standard_normal(shape).astype(info.dtype)
    if session.has_encoder:
        starts = list((manifest.generation or {}).get("decoder_start_token_ids", ())) or [0]
        written = generator.integers(1, vocabulary, GOLDEN_TOKENS - 1).tolist()
        inputs["decoder_input_ids"] = np.array([[*starts, *written]], np.int64)
    return inputs


def _free_axis(name: str, axis: int) -> int:
    """Return a size for an axis that may vary: one row, a few tokens, a small picture, half a second of sound."""
    if axis == 0:
        return 1
    if name == "input_values":
        return GOLDEN_SAMPLES
    if name == "pixel_values":
        return 3 if axis == 1 else 64
    return GOLDEN_TOKENS


def _vocabulary(manifest: Manifest) -> int:
    if manifest.generation is not None:
        return int(manifest.generation["vocab_size"])
    sizes = [module.weight_shape[0] for module in manifest.base.modules if module.type == "embedding"]
    return max(sizes, default=2)


def golden_outputs(session: Session, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return a session's outputs for a golden; of a language model's logits only the last position's, for size."""
    outputs = session.run(inputs)
    if session.bundle.manifest.generation is not None:
        return {"logits": outputs["logits"][:, -1:]}
    return outputs


def _golden_problem(session: Session, name: str, golden: Golden) -> str | None:
    try:
        session.use(None)
        base = golden_outputs(session, golden.inputs)
        session.use(name)
        adapted = golden_outputs(session, golden.inputs)
    except EdgeAdaptError as error:
        return error.message
    return bundles.check_golden(golden, base, adapted)


def _at_work(base: str, manifest: Manifest) -> tuple[dict[str, TargetModule], Library]:
    """Return a base's modules with their values, and the library that runs adapters on it.

    Raises:
        BundleError: if it is not the base that the bundle was made from.
    """
    from edgeadapt.merging.libraries import Libraries
    from edgeadapt.merging.load import load_base_model

    loaded = load_base_model(base, task=manifest.task, revision=manifest.base.revision)
    modules = dict(loaded.modules)
    if base_fingerprint(modules) != manifest.base.fingerprint:
        other = [m.path for m in manifest.base.modules if m.path not in modules or modules[m.path].digest != m.digest]
        raise BundleError(
            f"the bundle was made from {manifest.base.name}, not from {loaded.name}: "
            f"{len(other)} modules differ, {other[0] if other else 'in number'} first",
            hint="give the base that the bundle was exported from",
        )
    return modules, Libraries(loaded)
