"""Bottlenecks between arrays and a bundle's graph inputs: bound, read back, blended, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.adapters.adapter import Bottleneck, ResolvedAdapter
from edgeadapt.bundle.manifest import Manifest
from edgeadapt.errors import BundleError
from edgeadapt.slots import BottleneckKind, BottleneckSlot

Array = NDArray[Any]
Part = tuple[float, Mapping[str, Array]]

_FIT_HINT = "check that the adapter was trained on this bundle's base"


def bottleneck_inputs(manifest: Manifest) -> dict[str, str]:
    """Return the site of every graph input of a bottleneck."""
    return {name: slot.site for slot in manifest.bottlenecks for name in slot.inputs.values()}


def bind_bottlenecks(resolved: ResolvedAdapter, manifest: Manifest) -> dict[str, Array]:
    """Return an adapter's bottlenecks by graph input.

    Raises:
        BundleError: the bundle's graph has no such bottleneck at a module, a shape does not fit, or two share one.
    """
    slots = {(slot.site, slot.kind): slot for slot in manifest.bottlenecks}
    result: dict[str, Array] = {}
    for bottleneck in resolved.bottlenecks:
        kind = bottleneck.slot_kind
        slot = slots.get((bottleneck.site, kind))
        if slot is None:
            there = [_words(other.kind) for other in manifest.bottlenecks if other.site == bottleneck.site]
            raise BundleError(
                f"adapter {resolved.name!r} has a bottleneck {_words(kind)} beside module {bottleneck.site!r}, for "
                f"which this bundle has no slot (it has {', '.join(there) or 'none there'})",
                hint="export the bundle again together with this adapter, so that its graph has what it needs",
            )
        if slot.inputs["up"] in result:
            raise BundleError(
                f"adapter {resolved.name!r} has two bottlenecks {_words(kind)} at {slot.site!r}", hint=_FIT_HINT
            )
        _check_shapes(resolved.name, slot, bottleneck)
        result |= dict(zip((slot.inputs[term] for term in kind.terms), bottleneck.arrays, strict=True))
    return result


def read_bottlenecks(name: str, inputs: Mapping[str, Array], manifest: Manifest) -> tuple[Bottleneck, ...]:
    """Return the bottlenecks that graph inputs stand for: the inverse of `bind_bottlenecks`.

    Raises:
        BundleError: only part of one is there.
    """
    found = []
    for slot in manifest.bottlenecks:
        terms = slot.kind.terms
        given: dict[str, Any] = {term: inputs[slot.inputs[term]] for term in terms if slot.inputs[term] in inputs}
        if given and len(given) < len(terms):
            missing = next(term for term in terms if term not in given)
            raise BundleError(
                f"adapter {name!r} has no {slot.inputs[missing]!r}, but {slot.inputs[next(iter(given))]!r}: part of a "
                "bottleneck is missing",
                hint=_FIT_HINT,
            )
        if given:
            found.append(
                Bottleneck(
                    *(slot.site, slot.reads, slot.activation, slot.normalized),  # type: ignore[arg-type]  # checked
                    **given,
                    stage=slot.stage,
                )
            )
    return tuple(found)


def blend_bottlenecks(parts: Sequence[Part], manifest: Manifest) -> dict[str, Array]:
    """Return the bottlenecks of a weighted blend: side by side, each weighted on its way up. Exact.

    Raises:
        BundleError: a bottleneck would read another adapter's change of its module.
    """
    result: dict[str, Array] = {}
    for slot in manifest.bottlenecks:
        used = [(weight, inputs) for weight, inputs in parts if slot.inputs["up"] in inputs]
        if not used:
            continue
        _refuse_mixture(parts, slot, manifest)
        if slot.fused:  # there is one part: its keys stay as they are
            result |= {name: used[0][1][name] for name in slot.inputs.values()}
        for term in ("down", "down_bias"):
            arrays = [inputs[slot.inputs[term]] for _, inputs in used]
            result[slot.inputs[term]] = np.concatenate(arrays, axis=-1, dtype=np.float32)
        ups = [(weight * np.asarray(inputs[slot.inputs["up"]], np.float64)) for weight, inputs in used]
        result[slot.inputs["up"]] = np.concatenate(ups, axis=-2).astype(np.float32)
        biases = [(weight * np.asarray(inputs[slot.inputs["up_bias"]], np.float64)) for weight, inputs in used]
        result[slot.inputs["up_bias"]] = np.sum(biases, axis=0).astype(np.float32)
    return result


def _refuse_mixture(parts: Sequence[Part], slot: BottleneckSlot, manifest: Manifest) -> None:
    here = {name for other in manifest.bottlenecks if other.site == slot.site for name in other.inputs.values()}
    if (slot.stage or slot.fused) and sum(not here.isdisjoint(inputs) for _, inputs in parts) > 1:
        what = "an attention over several bottlenecks" if slot.fused else "one bottleneck behind another"
        raise BundleError(
            f"in this blend one adapter has {what} at module {slot.site!r}, and another has a bottleneck there too; "
            "such a blend has no form that the graph computes",
            hint="blend adapters of single bottlenecks, or use one adapter at a time",
        )
    if slot.reads == "residual":
        return
    terms = {name for other in manifest.slots if other.site == slot.site for name in other.inputs.values()}
    if any(name in inputs for _, inputs in parts for name in terms):
        raise BundleError(
            f"in this blend one adapter changes module {slot.site!r} and another has a bottleneck that reads it; such "
            "a blend has no form that the graph computes",
            hint="blend adapters of one kind, or use one adapter at a time",
        )


def check_bottleneck_slot(slot: BottleneckSlot, features: Mapping[str, int]) -> str | None:
    """Return what is wrong with a bottleneck's slot in a manifest, or None.

    Args:
        slot: from a manifest whose choices are checked.
        features: the number of outputs of the base's modules, by path.
    """
    if slot.site not in features:
        return f"bottleneck slot {slot.site!r} is not a module of the base"
    terms = slot.kind.terms
    if tuple(sorted(slot.inputs)) != tuple(sorted(terms)):
        return f"bottleneck slot {slot.site!r} has the terms {sorted(slot.inputs)}, must have {list(terms)}"
    if slot.stage < 0:
        return f"bottleneck slot {slot.site!r} has the stage {slot.stage}, must be 0 or more"
    if slot.features != features[slot.site]:
        return f"bottleneck slot {slot.site!r} has {slot.features} features, its module {features[slot.site]}"
    return None


def width_of(bottlenecks: Iterable[Bottleneck]) -> int:
    """Return the largest width, 0 for none."""
    return max((int(bottleneck.up.shape[-2]) for bottleneck in bottlenecks), default=0)


def _check_shapes(adapter: str, slot: BottleneckSlot, bottleneck: Bottleneck) -> None:
    width = bottleneck.up.shape[-2] if bottleneck.up.ndim >= 2 else 0
    parts = bottleneck.up.shape[0] if slot.fused else 1
    wanted = _wanted_shapes(slot, width, parts)
    for term, value, shape in zip(slot.kind.terms, bottleneck.arrays, wanted, strict=True):
        if value.shape != shape or width == 0 or parts == 0:
            raise BundleError(
                f"adapter {adapter!r}: {slot.inputs[term]!r} has the shape {list(value.shape)}, this base needs "
                f"{[size or 'width' for size in shape]}",
                hint=_FIT_HINT,
            )


def _wanted_shapes(slot: BottleneckSlot, width: int, parts: int) -> tuple[tuple[int, ...], ...]:
    size = slot.features
    if not slot.fused:
        return (size, width), (width,), (width, size), (size,)
    plain = ((size, width), (1, width), (width, size), (1, size), (width, size + 1), (1, size + 1))
    return tuple((parts, *shape) for shape in plain)


def _words(kind: BottleneckKind) -> str:
    more = [", normalized"] if kind.normalized else []
    more += [f", stage {kind.stage}"] if kind.stage else []
    more += [", fused"] if kind.fused else []
    return f"({kind.activation}, reads {kind.reads}{''.join(more)})"
