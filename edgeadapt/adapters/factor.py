"""From a module's weight in effect to the cheapest update that gives it, with the terms of `SiteUpdate`.

In this order: nothing, a gain per output, a gain per input, few rows or columns of the weight, a low rank, and last the
whole change. All of it in matrices M[in, out], as in y = x M; computed in float64 and verified as float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgeadapt.adapters.adapter import Array, Effective, ResolvedAdapter, SiteUpdate, TargetModule
from edgeadapt.slots import INPUT_GAIN_TYPES

TOLERANCE = 1e-6
"""The largest error of a gain or a low rank, relative to the weight's largest value: what float32 sums leave anyway."""
_SKETCH = 64  # ranks up to this are found without looking at all of the change
_EPS = float(np.finfo(np.float32).eps)
_NO_GAIN = 4 * _EPS
Wide = NDArray[np.float64]


def factor(module: TargetModule, now: Effective) -> SiteUpdate | None:
    """Return the update that makes `module` compute with `now`'s weight and bias, None if it does already.

    The module's own values must be at hand.
    """
    assert module.weight is not None
    old, new = _matrix(module.weight(), module), _matrix(now.weight, module)
    biases = _biases(module, now)
    largest = float(np.abs(new).max(initial=0.0))
    change = new.astype(np.float64) - old
    changed = np.abs(change) > 2 * _EPS * largest  # less is what float32 leaves of equal numbers
    if not changed.any():
        return _update(offset=_offset(biases[1] - biases[0], biases))
    gain = _gain(old, new, largest)
    if gain is not None:
        return _update(gain=gain, offset=_offset(biases[1] - gain * biases[0], biases))
    input_gain = _gain(old.T, new.T, largest) if module.type in INPUT_GAIN_TYPES else None
    if input_gain is not None:
        return _update(input_gain=input_gain, offset=_offset(biases[1] - biases[0], biases))
    if now.low_rank is not None and (update := _known(old, new, now.low_rank, biases, largest)) is not None:
        return update
    noise = 2 * _EPS * float(np.sqrt(np.mean(np.square(new, dtype=np.float64))))
    a, b = _product(change, changed, noise, TOLERANCE * largest)
    if module.type == "embedding" and module.output_scale is not None:
        b = b * module.output_scale
    return _shaped(module, a, b, _offset(biases[1] - biases[0], biases))


def dense_sites(resolved: ResolvedAdapter) -> list[str]:
    """Return the modules at which an adapter's product costs at least as much as the base's own."""
    return [path for path, update in resolved.sites.items() if _is_dense(update)]


def _is_dense(update: SiteUpdate) -> bool:
    if update.a is None or update.b is None:
        return False
    image = update.b.ndim == 4
    inputs, outputs = (int(update.a[0].size), len(update.b)) if image else (len(update.a), int(update.b.shape[1]))
    return update.rank * (inputs + outputs) >= inputs * outputs


def _matrix(weight: Array, module: TargetModule) -> Array:
    """Return a weight as float32[in, out]; a convolution's taps are inputs."""
    if module.type == "conv2d":
        return weight.reshape(weight.shape[0], -1).T
    return weight.T if module.type == "linear" else weight


def _biases(module: TargetModule, now: Effective) -> Wide:
    """Return the bias before and after, float64[2, out]."""
    zeros = np.zeros(_outputs(module))
    old = zeros if module.bias is None else module.bias()
    return np.stack([old, zeros if now.bias is None else now.bias]).astype(np.float64)


def _outputs(module: TargetModule) -> int:
    return module.weight_shape[1] if module.type in ("embedding", "conv1d") else module.weight_shape[0]


def _offset(offset: Wide, biases: Wide) -> Wide | None:
    noise = 4 * _EPS * np.abs(biases).max(initial=0.0)
    return offset if np.abs(offset).max(initial=0.0) > noise else None


def _update(gain: Wide | None = None, offset: Wide | None = None, input_gain: Wide | None = None) -> SiteUpdate | None:
    update = SiteUpdate(gain=_single(gain), offset=_single(offset), input_gain=_single(input_gain))
    return update if update.terms else None


def _single(value: Wide | None) -> Array | None:
    return None if value is None else value.astype(np.float32)


def _gain(old: Array, new: Array, largest: float) -> Wide | None:
    """Return the factor per column that turns one matrix into the other, or None if there is none."""
    wide = old.astype(np.float64)
    squares = np.einsum("io,io->o", wide, wide)
    gain = np.einsum("io,io->o", wide, new.astype(np.float64)) / np.where(squares == 0, 1.0, squares)
    gain = np.where(squares == 0, 1.0, gain).astype(np.float32).astype(np.float64)
    return gain if np.abs(wide * gain - new).max() <= TOLERANCE * largest else None


def _known(old: Array, new: Array, pair: tuple[Array, Array], biases: Wide, largest: float) -> SiteUpdate | None:
    """Return the update whose A and B are known and whose gain is found, None if they do not give the weight."""
    a, b = (factor.astype(np.float64) for factor in pair)
    gain = _gain((old + a @ b).astype(np.float32), new, largest)
    if gain is None:
        return None
    offset = _offset(biases[1] - gain * biases[0], biases)
    if np.abs(gain - 1.0).max() <= _NO_GAIN:
        gain = None
    first, second = (np.ascontiguousarray(x, np.float32) for x in pair)
    return SiteUpdate(first, second, _single(gain), _single(offset))


def _product(change: Wide, changed: NDArray[np.bool_], noise: float, allowed: float) -> tuple[Wide, Wide]:
    """Return A[in, rank] and B[rank, out] whose product is the change: the smallest rank that is exact.

    Args:
        change: float64[in, out].
        changed: where it is more than rounding.
        noise: how large rounding is in the mean.
        allowed: the largest error.
    """
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    part = change[np.ix_(rows, columns)]
    factors = _low_rank(part, noise, allowed) if min(part.shape) > 1 else None
    if factors is not None:
        a = np.zeros((len(change), factors[0].shape[1]))
        b = np.zeros((factors[1].shape[0], change.shape[1]))
        a[rows], b[:, columns] = factors
        return a, b
    if part.shape[0] <= part.shape[1]:
        return _units(len(change), rows), change[rows]
    return change[:, columns], _units(change.shape[1], columns).T


def _units(size: int, index: NDArray[np.intp]) -> Wide:
    """Return the columns `index` of an identity matrix of this size."""
    columns = np.zeros((size, len(index)))
    columns[index, np.arange(len(index))] = 1.0
    return columns


def _low_rank(matrix: Wide, noise: float, allowed: float) -> tuple[Wide, Wide] | None:
    """Return the factors of a matrix at its numerical rank, None if that is the full one or they are not exact."""
    if matrix.shape[0] > matrix.shape[1]:
        turned = _low_rank(matrix.T, noise, allowed)
        return None if turned is None else (turned[1].T, turned[0].T)
    smallest = noise * float(np.sqrt(matrix.shape[0]) + np.sqrt(matrix.shape[1]))
    for basis in _bases(matrix):
        part = matrix if basis is None else basis.T @ matrix
        values, vectors = np.linalg.eigh(part @ part.T)
        kept = np.sqrt(np.maximum(values, 0.0)) > smallest
        if kept.all() or not kept.any():
            continue
        a = vectors[:, kept] if basis is None else basis @ vectors[:, kept]
        scale = np.sqrt(np.sqrt(values[kept]))
        factors = _rounded(a * scale), _rounded((vectors[:, kept] / scale).T @ part)
        if np.abs(factors[0] @ factors[1] - matrix).max() <= allowed:
            return factors
    return None


def _bases(matrix: Wide) -> Iterator[Wide | None]:
    """Yield an orthonormal basis of what some random combinations of the columns span, then None: all rows."""
    if len(matrix) > 2 * _SKETCH:
        weights = np.random.default_rng(0).standard_normal((matrix.shape[1], _SKETCH))
        yield np.linalg.qr(matrix @ weights)[0]
    yield None


def _rounded(value: Wide) -> Wide:
    return value.astype(np.float32).astype(np.float64)


def _shaped(module: TargetModule, a: Wide, b: Wide, offset: Wide | None) -> SiteUpdate:
    """Return the factors in `SiteUpdate`'s layouts."""
    first, second = a.astype(np.float32), b.astype(np.float32)
    if module.type == "conv2d":
        first = np.ascontiguousarray(first.T).reshape(-1, *module.weight_shape[1:])
        second = np.ascontiguousarray(second.T)[:, :, None, None]
    return SiteUpdate(a=np.ascontiguousarray(first), b=np.ascontiguousarray(second), offset=_single(offset))
