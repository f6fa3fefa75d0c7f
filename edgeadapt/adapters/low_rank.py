"""The arithmetic of the LoRA family: factors as trained to y' = (y + (x A) B) * gain + offset.

Sources: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353, section 4) as peft 0.21 computes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeadapt.adapters.adapter import Array, SiteUpdate, TargetModule
from edgeadapt.errors import AdapterError

_ROWS = 1024  # rows of a weight whose change is held at once


@dataclass(frozen=True)
class Factors:
    """One module's low-rank term in peft's layouts.

    a: linear, conv1d float32[rank, in]; embedding float32[rank, num_embeddings]; conv2d float32[rank, in, kh, kw]
    b: float32[out, rank]; conv2d float32[out, rank / groups, 1, 1]
    magnitude: float32[out] (DoRA) or None; bias: float32[out] (lora_bias) or None
    """

    a: Array
    b: Array
    scaling: float
    magnitude: Array | None = None
    bias: Array | None = None


def scaling_of(alpha: float, rank: int, *, rank_stabilized: bool) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def expected_shapes(module: TargetModule, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a and b that fit `module` (see `Factors`); peft's A sees all of a grouped conv's input."""
    shape = module.weight_shape
    if module.type == "conv2d":
        return (rank, shape[1] * module.groups, *shape[2:]), (shape[0], rank // module.groups, 1, 1)
    inputs, outputs = shape if module.type in ("conv1d", "embedding") else (shape[1], shape[0])
    return (rank, inputs), (outputs, rank)


def site_update(module: TargetModule, factors: Factors | None, new_bias: Array | None = None) -> SiteUpdate:
    """Return what the factors and a new bias (float32[out]) of the base's module do at its output y.

    y holds the base's weight and old bias. DoRA scales the product but not the bias, so with g = m / |W + sBA| and
    the bias b (old) or b' (in force), y' = (y + (x A) B) * g + b' - g * b.

    Raises:
        AdapterError: the base's values are needed and not at hand.
    """
    if factors is None:
        return SiteUpdate(offset=_offset(module, None, None, new_bias))
    a, b = _graph_layout(module, factors)
    gain = None if factors.magnitude is None else _gain(module, factors)
    added = None if factors.bias is None else (factors.bias * np.float64(factors.scaling)).astype(np.float32)
    return SiteUpdate(a=a, b=b, gain=gain, offset=_offset(module, gain, added, new_bias))


def _graph_layout(module: TargetModule, factors: Factors) -> tuple[Array, Array]:
    """Return A and B in `SiteUpdate`'s layouts, the scaling folded into B."""
    scaling = factors.scaling
    if module.type == "embedding":
        scaling *= 1.0 if module.output_scale is None else module.output_scale
    b = (factors.b * np.float64(scaling)).astype(np.float32)
    if module.type == "conv2d":
        return factors.a, _ungrouped(b, module.groups)
    return np.ascontiguousarray(factors.a.T), np.ascontiguousarray(b.T)


def _ungrouped(b: Array, groups: int) -> Array:
    """Return a grouped 1x1 kernel float32[out, rank / groups, 1, 1] as the dense float32[out, rank, 1, 1]."""
    if groups == 1:
        return b
    out, per_group = b.shape[:2]
    dense = np.zeros((out, per_group * groups, 1, 1), np.float32)
    for group in range(groups):
        rows = slice(group * (out // groups), (group + 1) * (out // groups))
        dense[rows, group * per_group : (group + 1) * per_group] = b[rows]
    return dense


def _gain(module: TargetModule, factors: Factors) -> Array:
    """Return DoRA's m / |W + sBA|, float32[out]: the norm runs over each output feature's weights."""
    if module.groups != 1:
        raise AdapterError(
            f"DoRA on module {module.path!r}, a convolution with {module.groups} groups, is not defined",
            hint="train without use_dora, or exclude the module",
        )
    if module.weight is None:
        raise AdapterError(
            f"DoRA at module {module.path!r} needs the base's weights, which a bundle does not hold", hint="pass --base"
        )
    assert factors.magnitude is not None
    norms = np.concatenate(list(_row_norms(module, module.weight(), factors)))
    if not norms.all():
        raise AdapterError(
            f"DoRA at module {module.path!r}: output feature {int(np.argmin(norms))} has a weight of length 0",
            hint="give the base that the adapter was trained on",
        )
    gain: Array = (factors.magnitude.astype(np.float64) / norms).astype(np.float32)
    return gain


def _row_norms(module: TargetModule, weight: Array, factors: Factors) -> Iterator[NDArray[np.float64]]:
    """Yield |W + sBA| of blocks of output features, in float64 so that the order of sums does not show."""
    rows = weight.T if module.type in ("conv1d", "embedding") else weight.reshape(len(weight), -1)
    a = factors.a.reshape(len(factors.a), -1).astype(np.float64)
    b = factors.b.reshape(len(factors.b), -1).astype(np.float64) * factors.scaling
    for start in range(0, len(rows), _ROWS):
        block = slice(start, start + _ROWS)
        yield np.linalg.norm(rows[block] + b[block] @ a, axis=1)


def _offset(module: TargetModule, gain: Array | None, added: Array | None, new_bias: Array | None) -> Array | None:
    """Return b' - g * b + the adapter's own bias, float32[out], or None where that is nothing."""
    needs_old = module.has_bias and (gain is not None or new_bias is not None)
    if needs_old and module.bias is None:
        raise AdapterError(
            f"the bias of module {module.path!r} changes, and the base's own bias is not at hand in a bundle",
            hint="pass --base",
        )
    old = module.bias().astype(np.float64) if needs_old and module.bias is not None else np.zeros(module.out_features)
    in_force = old if new_bias is None else new_bias.astype(np.float64)
    offset = in_force - (old if gain is None else gain.astype(np.float64) * old)
    if added is not None:
        offset = offset + added
    return offset.astype(np.float32) if offset.any() else None
