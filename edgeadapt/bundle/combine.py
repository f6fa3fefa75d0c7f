"""Adapters of a bundle made into one, for good: exactly (see blend.py), recompressed, or as peft's mixing methods do.

Beside the exact sum ("cat") there are, for the changes D_i = A_i B_i of a module's weight and weights w_i:

task_arithmetic   sum_i w_i D_i at the smallest rank that holds it
svd               the same at a chosen rank
magnitude_prune   sum_i w_i top(D_i), top keeping the share `density` that is largest
ties              the mean of w_i top(D_i) over those i whose sign is that of sum_i top(D_i)
dare_linear       sum_i w_i drop(D_i), drop keeping each number with chance `density`, over `density`
dare_ties         ties with drop for top
linear            (sum_i +-sqrt|w_i| A_i)(sum_i sqrt|w_i| B_i): cross terms A_i B_j too, so no sum of adapters

The four with a density are peft's `*_svd` of these names: peft's plain ones prune A and B apart, which mixes cross
terms in as linear does. Scalings lie in B here; where the adapters' differ, peft's linear splits them otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.blend import blend
from edgeadapt.bundle.manifest import Manifest
from edgeadapt.bundle.prefix import is_prefix_tensor
from edgeadapt.bundle.rules import slot_inputs
from edgeadapt.errors import BundleError
from edgeadapt.slots import Slot

Array = NDArray[Any]
Pair = tuple[Array, Array]

SUMS = ("cat", "task_arithmetic", "svd")
PRUNING = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
RANDOM = ("dare_ties", "dare_linear")
METHODS = ("cat", "linear", "svd", *PRUNING, "task_arithmetic")

_ROUNDING = 1e-7
"""Singular values below this share of the largest are float32's rounding of the adapters."""


@dataclass(frozen=True)
class Part:
    """One adapter of a combination: its name, its weight, and what it binds (as `bind` gives it)."""

    name: str
    weight: float
    inputs: Mapping[str, Array]


@dataclass(frozen=True)
class Settings:
    """How adapters are combined; None where the method has no such setting, or for its own rank.

    density: the share of numbers that stays; rank: the largest at any module, None for the adapters' largest there
    seed: of what is dropped by chance
    """

    method: str
    density: float | None
    rank: int | None
    seed: int | None


def settings_of(
    method: str, *, density: float | None = None, rank: int | None = None, seed: int | None = None
) -> Settings:
    """Return a method's settings, with defaults (density 0.5, seed 0) for what is not given.

    Raises:
        BundleError: there is no such method, a setting means nothing to it, or a value is out of range.
    """
    if method not in METHODS:
        raise BundleError(f"there is no method {method!r} of blending", hint=f"use one of {', '.join(METHODS)}")
    takers = {"density": PRUNING, "rank": ("svd", *PRUNING), "seed": RANDOM}
    for setting, value in (("density", density), ("rank", rank), ("seed", seed)):
        if value is not None and method not in takers[setting]:
            raise BundleError(
                f"--{setting} {value} means nothing to the method {method!r}",
                hint=f"leave it out, or choose one of {', '.join(takers[setting])}",
            )
    if density is not None and not 0 < density <= 1:
        raise BundleError(f"--density {density}: a share of numbers above 0 and at most 1", hint="try 0.5")
    if rank is not None and rank < 1:
        raise BundleError(f"--rank {rank}: a rank of at least 1", hint="leave it out for the adapters' own")
    if seed is not None and seed < 0:
        raise BundleError(f"--seed {seed}: a seed of at least 0", hint="leave it out for 0")
    return Settings(
        method,
        (0.5 if density is None else density) if method in PRUNING else None,
        rank,
        (seed or 0) if method in RANDOM else None,
    )


def combine(
    parts: Sequence[Part],
    manifest: Manifest,
    settings: Settings,
    advance: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[dict[str, Array], float]:
    """Return one adapter's tensors (float32 by input name, sorted), and what its ranks lose.

    That is the relative Frobenius error, over all modules, of the tensors' products against what the method defines.

    Args:
        parts: the adapters; the order matters to what is dropped by chance.
        manifest: the bundle's.
        settings: see `settings_of`.
        advance: told of every slot that is done, and of their number.

    Raises:
        BundleError: a weight is 0 or not finite, the method cannot combine something of an adapter or leaves nothing
            of them, or as `blend`.
    """
    _check(parts, manifest, settings.method)
    tensors: dict[str, Array] = {}
    if settings.method in SUMS:
        tensors = blend([(part.weight, part.inputs) for part in parts], manifest)
        if settings.method == "cat":
            return tensors, 0.0
    generator = np.random.default_rng(settings.seed)
    lost = total = 0.0
    for index, slot in enumerate(manifest.slots):
        factors = {part.name: _matrices(slot, part.inputs) for part in parts if slot.inputs.get("a") in part.inputs}
        if factors:
            weights = [part.weight for part in parts if part.name in factors]
            limit = settings.rank or max(a.shape[1] for a, _ in factors.values())
            if settings.method in SUMS:
                summed = _matrices(slot, tensors)
                pair, *norms = _recompress(*summed, None if settings.method == "task_arithmetic" else limit)
            elif settings.method == "linear":
                pair, norms = _linear(slot.site, weights, factors), [0.0, 0.0]
            else:
                changes = [a @ b for a, b in factors.values()]
                pair, *norms = _truncate(_mix(changes, weights, settings, generator), limit)
            lost, total = lost + norms[0], total + norms[1]
            tensors = _with_pair(tensors, slot, pair, parts)
        advance(index + 1, len(manifest.slots))
    if not tensors:
        raise BundleError(
            f"nothing is left of the adapters: {settings.method} at density {settings.density} keeps no number",
            hint="choose a larger --density",
        )
    return dict(sorted(tensors.items())), math.sqrt(lost / total) if total else 0.0


def relative_error(found: Mapping[str, Array], exact: Mapping[str, Array], manifest: Manifest) -> float:
    """Return how far the products A B of `found` are from those of `exact`: Frobenius norms over all modules.

    0 where neither has any.
    """
    difference = total = 0.0
    for slot in manifest.slots:
        pairs = [
            (sign * a, b)
            for sign, tensors in ((1.0, found), (-1.0, exact))
            if slot.inputs.get("a") in tensors
            for a, b in [_matrices(slot, tensors)]
        ]
        if pairs:
            difference += _norm2(np.concatenate([a for a, _ in pairs], axis=1), np.concatenate([b for _, b in pairs]))
        if slot.inputs.get("a") in exact:
            total += _norm2(*_matrices(slot, exact))
    return math.sqrt(difference / total) if total else 0.0


def _check(parts: Sequence[Part], manifest: Manifest, method: str) -> None:
    products = {slot.inputs[term] for slot in manifest.slots for term in ("a", "b") if term in slot.inputs}
    owners = slot_inputs(manifest)
    for part in parts:
        if part.weight == 0 or not math.isfinite(part.weight):
            raise BundleError(
                f"the weight of adapter {part.name!r} is {part.weight}, must be a number other than 0",
                hint="leave the adapter out, or give a number such as 0.7",
            )
        if any(is_prefix_tensor(name) for name in part.inputs):
            raise BundleError(
                f"adapter {part.name!r} begins texts with virtual tokens: keys of two prefixes do not add, nor does a "
                "share of one mean anything",
                hint="leave it out of the blend",
            )
        other = next((name for name in part.inputs if name not in products), None)
        if method not in SUMS and other is not None:
            raise BundleError(
                f"adapter {part.name!r} sets {other!r} at {owners.get(other, other)!r}, and {method} is defined for "
                "low-rank changes of weights only",
                hint=f"use one of {', '.join(SUMS)}, which sum everything that an adapter sets",
            )


def _matrices(slot: Slot, tensors: Mapping[str, Array]) -> Pair:
    """Return A and B of a slot as float64[in, r] and float64[r, out]; a convolution's kernel is flattened into in."""
    a, b = (np.asarray(tensors[slot.inputs[term]], np.float64) for term in ("a", "b"))
    return (a.reshape(len(a), -1).T, b[:, :, 0, 0].T) if slot.type == "conv2d" else (a, b)


def _with_pair(tensors: dict[str, Array], slot: Slot, pair: Pair, parts: Sequence[Part]) -> dict[str, Array]:
    """Return tensors with a slot's A and B as the graph takes them; without them where nothing is left."""
    a_name, b_name = slot.inputs["a"], slot.inputs["b"]
    result = {name: value for name, value in tensors.items() if name not in (a_name, b_name)}
    a, b = pair
    if a.shape[1] == 0:
        return result
    if slot.type == "conv2d":
        kernel = next(part.inputs[a_name].shape[1:] for part in parts if a_name in part.inputs)
        a, b = a.T.reshape(-1, *kernel), b.T[:, :, None, None]
    return result | {name: np.ascontiguousarray(x, np.float32) for name, x in ((a_name, a), (b_name, b))}


def _linear(site: str, weights: Sequence[float], factors: Mapping[str, Pair]) -> Pair:
    ranks = {name: a.shape[1] for name, (a, _) in factors.items()}
    if len(set(ranks.values())) > 1:
        raise BundleError(
            f"linear adds A to A and B to B, but at module {site!r} the ranks differ: "
            + ", ".join(f"{name} {rank}" for name, rank in ranks.items()),
            hint="use cat, which is exact for all ranks, or svd",
        )
    pairs = list(zip(weights, factors.values(), strict=True))
    return (
        np.sum([math.copysign(math.sqrt(abs(weight)), weight) * a for weight, (a, _) in pairs], axis=0),
        np.sum([math.sqrt(abs(weight)) * b for weight, (_, b) in pairs], axis=0),
    )


def _mix(changes: list[Array], weights: Sequence[float], settings: Settings, generator: np.random.Generator) -> Array:
    """Return the change float64[in, out] that a pruning method makes of the adapters'."""
    density = settings.density or 1.0
    by_chance = settings.method in RANDOM
    kept = [_drop(change, density, generator) if by_chance else _top(change, density) for change in changes]
    total: Array = np.zeros_like(kept[0])
    if settings.method not in ("ties", "dare_ties"):
        for weight, change in zip(weights, kept, strict=True):
            total += weight * change
        return total
    majority = np.where(np.sum(kept, axis=0) >= 0, 1.0, -1.0)
    count = np.zeros_like(total)
    for weight, change in zip(weights, kept, strict=True):
        agrees = np.sign(change) == majority
        total += weight * change * agrees
        count += agrees
    return np.asarray(total / np.maximum(count, 1))


def _top(change: Array, density: float) -> Array:
    """Return the numbers of largest magnitude, zeros elsewhere."""
    left_out = change.size - int(density * change.size)
    if left_out == 0:
        return change
    result = change.copy().reshape(-1)
    result[np.argpartition(np.abs(result), left_out - 1)[:left_out]] = 0
    return result.reshape(change.shape)


def _drop(change: Array, density: float, generator: np.random.Generator) -> Array:
    """Return each number with chance `density`, over `density`, so that the expectation stays."""
    return change if density == 1 else np.asarray(change * (generator.random(change.shape) < density) / density)


def _recompress(a: Array, b: Array, limit: int | None) -> tuple[Pair, float, float]:
    """Return A B at a rank of at most `limit`, and the squared norms of what is lost and of the whole."""
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(b.T)
    u, values, v = np.linalg.svd(r_a @ r_b.T)
    kept = min(int((values > _ROUNDING * values[0]).sum()), len(values) if limit is None else limit)
    root = np.sqrt(values[:kept])
    pair = (q_a @ u[:, :kept]) * root, root[:, None] * (v[:kept] @ q_b.T)
    return pair, float((values[kept:] ** 2).sum()), float((values**2).sum())


def _truncate(change: Array, limit: int) -> tuple[Pair, float, float]:
    """Return the best product of rank `limit` at most for a matrix, and the squared norms as `_recompress`.

    By the eigenvectors of its smaller Gram matrix: several times as fast as its SVD, and what is projected on them is
    as exact, since only the largest are wanted.
    """
    wide = change.shape[0] < change.shape[1]
    tall = change.T if wide else change
    squares, vectors = np.linalg.eigh(tall.T @ tall)
    values = np.sqrt(np.maximum(squares[::-1], 0))
    kept = min(int((values > _ROUNDING * values[0]).sum()), limit)
    v, root = vectors[:, ::-1][:, :kept], np.sqrt(values[:kept])
    left, right = (tall @ v) / root, root[:, None] * v.T
    lost, total = float((values[kept:] ** 2).sum()), float((values**2).sum())
    return ((right.T, left.T) if wide else (left, right)), lost, total


def _norm2(a: Array, b: Array) -> float:
    """Return the squared Frobenius norm of A B without making the product, exact where the parts cancel."""
    r_a, r_b = np.linalg.qr(a)[1], np.linalg.qr(b.T)[1]
    return float(((r_a @ r_b.T) ** 2).sum())
