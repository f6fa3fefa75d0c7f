"""Several adapters at once, each with a weight: exact, as one set of graph inputs.

The blend of adapters with outputs y_i at a module is y + sum_i w_i (y_i - y), where

    y_i = (W (x * h_i) + b + (x A_i) B_i) * g_i + c_i

so that it is again of the form that a slot computes (docs/formats/bundle-1.md, "Blending"):

    g = 1 + sum_i w_i (g_i - 1),   A = [A_1 A_2 ...],   B = [w_1 B_1 g_1 / g; w_2 B_2 g_2 / g; ...],   c = sum_i w_i c_i
    h = 1 + sum_i w_i (h_i - 1)

but where one scales a module's inputs (h) and one, the same or another, its outputs (g): W diag(h) g is no such sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.bottlenecks import blend_bottlenecks
from edgeadapt.bundle.branches import refuse_branches
from edgeadapt.bundle.manifest import Manifest
from edgeadapt.bundle.prefix import is_prefix_tensor
from edgeadapt.bundle.rules import slot_inputs
from edgeadapt.errors import BundleError
from edgeadapt.slots import ParameterSlot, Slot

Array = NDArray[Any]
Part = tuple[float, Mapping[str, Array]]


def blend(parts: Sequence[Part], manifest: Manifest, defaults: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Return the graph inputs (float32 by name) of a weighted blend of adapters; all others keep their defaults.

    One part of weight 1 comes back as it is. Parts of weight 0 count for nothing.

    Args:
        parts: weight and graph inputs (as `bind` gives them) of each adapter.
        manifest: the bundle's.
        defaults: the base's value of replaced parameters by input name; needed only where the weights of the
            adapters that replace one do not add up to 1.

    Raises:
        BundleError: if a weight is not finite, an input unknown, replaced parameters have different shapes or no
            known default, the blended gain is 0 where B would have to be divided by it, a module has both a gain and an
            input gain, or an adapter has a prefix or a branch.
    """
    _check_parts(parts, manifest)
    used = [(weight, inputs) for weight, inputs in parts if weight != 0]
    if len(used) == 1 and used[0][0] == 1:
        return {name: np.asarray(value, np.float32) for name, value in sorted(used[0][1].items())}
    _refuse_prefixes(used)
    refuse_branches([inputs for _, inputs in used], manifest)
    result: dict[str, Array] = {}
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        for slot in manifest.slots:
            result |= _blend_slot(used, slot)
        for parameter in manifest.parameters:
            result |= _blend_parameter(used, parameter, (defaults or {}).get(parameter.input))
        result |= blend_bottlenecks(used, manifest)
    for name, value in result.items():
        if not np.isfinite(value).all():
            raise BundleError(f"the blend overflows at {name!r}", hint="use smaller weights")
    return dict(sorted(result.items()))


def _check_parts(parts: Sequence[Part], manifest: Manifest) -> None:
    if not parts:
        raise BundleError("a blend needs at least one adapter", hint="name adapters, or choose None for the base")
    known = slot_inputs(manifest)
    for weight, inputs in parts:
        if not math.isfinite(weight):
            raise BundleError(f"blend weight {weight} is not a finite number", hint="give a number such as 0.7")
        unknown = sorted(name for name in inputs if name not in known and not is_prefix_tensor(name))
        if unknown:
            raise BundleError(
                f"{unknown[0]!r} is not an adapter input of bundle {manifest.name!r}",
                hint="add the adapter to this bundle first",
            )


def _refuse_prefixes(parts: Sequence[Part]) -> None:
    if any(is_prefix_tensor(name) for _, inputs in parts for name in inputs):
        raise BundleError(
            "an adapter of the blend begins the text with virtual tokens: keys of two prefixes do not add, nor does a "
            "share of one mean anything",
            hint="use that adapter alone, with weight 1",
        )


def _blend_slot(parts: Sequence[Part], slot: Slot) -> dict[str, Array]:
    names = slot.inputs
    gain, input_gain = (_blend_gain(parts, names.get(term, "")) for term in ("gain", "input_gain"))
    if gain is not None and input_gain is not None:
        raise BundleError(
            f"one adapter of the blend scales the inputs of module {slot.site!r} (input_gain) and one, the same or "
            "another, its outputs (gain): their weighted sum is neither",
            hint="use one of them alone, with weight 1",
        )
    result: dict[str, Array] = {}
    for term, value in (("gain", gain), ("input_gain", input_gain)):
        if value is not None:
            result[names[term]] = value.astype(np.float32)
    if "offset" in names:
        offsets = [weight * _wide(inputs[names["offset"]]) for weight, inputs in parts if names["offset"] in inputs]
        if offsets:
            result[names["offset"]] = np.sum(offsets, axis=0).astype(np.float32)
    if "a" in names:
        result |= _blend_low_rank(parts, slot, gain)
    return result


def _blend_gain(parts: Sequence[Part], name: str) -> Array | None:
    terms = [weight * (_wide(inputs[name]) - 1) for weight, inputs in parts if name in inputs]
    return 1 + np.sum(terms, axis=0) if terms else None


def _blend_low_rank(parts: Sequence[Part], slot: Slot, gain: Array | None) -> dict[str, Array]:
    a_name, b_name, gain_name = slot.inputs["a"], slot.inputs["b"], slot.inputs.get("gain", "")
    convolution = slot.type == "conv2d"
    a_parts: list[Array] = []
    b_parts: list[Array] = []
    for weight, inputs in parts:
        if (a_name in inputs) != (b_name in inputs):
            raise BundleError(f"only one of {a_name!r} and {b_name!r} is given", hint="bind both or neither")
        if a_name not in inputs:
            continue
        b = weight * _wide(inputs[b_name])
        if gain is not None:
            own = _wide(inputs[gain_name]) if gain_name in inputs else np.ones_like(gain)
            ratio = _ratio(own, gain, slot.site)
            b = b * (ratio[:, None, None, None] if convolution else ratio)  # float[out, r, 1, 1] or float[r, out]
        a_parts.append(inputs[a_name])
        b_parts.append(b.astype(np.float32))
    if not a_parts:
        return {}
    rank_of_a, rank_of_b = (0, 1) if convolution else (1, 0)
    return {
        a_name: np.concatenate(a_parts, axis=rank_of_a, dtype=np.float32),
        b_name: np.concatenate(b_parts, axis=rank_of_b, dtype=np.float32),
    }


def _ratio(own: Array, gain: Array, site: str) -> Array:
    zero = np.flatnonzero(gain == 0)
    if zero.size:
        raise BundleError(
            f"the blended gain of module {site!r} is exactly 0 at channel {int(zero[0])}, so the blend has no "
            "low-rank form there",
            hint="change one of the weights slightly",
        )
    return np.asarray(own / gain)


def _blend_parameter(parts: Sequence[Part], slot: ParameterSlot, default: Array | None) -> dict[str, Array]:
    values = [(weight, _wide(inputs[slot.input])) for weight, inputs in parts if slot.input in inputs]
    if not values:
        return {}
    shapes = sorted({value.shape for _, value in values})
    if len(shapes) > 1:
        raise _shapes_differ(slot, shapes)
    rest = 1 - math.fsum(weight for weight, _ in values)
    total = np.sum([weight * value for weight, value in values], axis=0)
    if abs(rest) > 1e-9:  # 0.7 + 0.2 + 0.1 is 1 but for rounding
        if default is None:
            raise BundleError(
                f"{slot.parameter!r} is replaced with weights that do not add up to 1, and the base's own value is "
                "not at hand",
                hint="choose weights that add up to 1",
            )
        if default.shape != shapes[0]:
            raise _shapes_differ(slot, [default.shape, shapes[0]])
        total = total + rest * _wide(default)
    return {slot.input: np.asarray(total, np.float32)}


def _shapes_differ(slot: ParameterSlot, shapes: Sequence[tuple[int, ...]]) -> BundleError:
    text = " and ".join(str(list(shape)) for shape in shapes)
    return BundleError(
        f"{slot.parameter!r} has different shapes in what is blended: {text}; such heads cannot be blended",
        hint="blend adapters with the same head with weights that add up to 1, or use one adapter at a time",
    )


def _wide(value: Array) -> Array:
    return np.asarray(value, np.float64)
