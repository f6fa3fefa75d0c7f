"""How an adapter's float32 tensors are stored in its file, and back: float32, float16, or int8 with scales.

float16   each number rounded; a tensor that float16 cannot hold stays float32
int8      NAME int8[...] and NAME.scale float32, which has one number along one axis and 1 elsewhere:
value = NAME * NAME.scale. Tensors of one axis, small as they are, and prefixes are stored as float16
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.prefix import is_prefix_tensor
from edgeadapt.errors import BundleError

Array = NDArray[Any]

DTYPES = ("float32", "float16", "int8")
"""What `adapter_dtype` may be."""
SCALE_SUFFIX = ".scale"

_FLOAT16_MAX_ERROR = 2.0**-10
"""Relative to a tensor's largest value; rounding to normal float16 numbers gives at most half of it."""
_LARGEST_CODE = 127
_LARGEST_SCALE = float(np.finfo(np.float32).max) / 128
_BLOCK = 2**18  # float16 numbers that are widened at once: they fit into a processor's cache
_WIDEN = np.float32(2.0**112)
"""float32's exponents begin 112 lower than float16's."""


def to_stored(tensors: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """Return the tensors of an adapter's file, sorted by name.

    Args:
        tensors: float32 by graph input name.
        dtype: one of `DTYPES`.

    Raises:
        BundleError: for another dtype, or a tensor that is named like scales.
    """
    if dtype not in DTYPES:
        raise BundleError(f"adapter dtype {dtype!r}", hint=f"use one of {', '.join(DTYPES)}")
    result: dict[str, Array] = {}
    for name, value in tensors.items():
        if dtype == "int8" and name.endswith(SCALE_SUFFIX):
            raise BundleError(f"tensor {name!r} is named like the scales of another", hint="use float16 adapters")
        wide = np.asarray(value, np.float32)
        coded = _codes(wide) if dtype == "int8" and not is_prefix_tensor(name) else None
        if coded is None:
            result[name] = wide if dtype == "float32" else _narrow(wide)
        else:
            result[name], result[name + SCALE_SUFFIX] = coded
    return dict(sorted(result.items()))


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of an adapter's file by graph input name, as stored, and the scales of those that are int8."""

    values: Mapping[str, Array]
    scales: Mapping[str, Array]

    def float32(self, name: str) -> NDArray[np.float32]:
        """Return what a tensor stands for; finite if the file's numbers are."""
        wide = np.empty(self.values[name].shape, np.float32)
        self.fill(wide, [(name, (...,))])
        return wide

    def fill(self, out: NDArray[np.float32], parts: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """Write what some tensors stand for into `out`, each at its index; elsewhere `out` has to be zero."""
        values = [(name, self.values[name], place) for name, place in parts]
        if all(value.dtype == np.float16 for _, value, _ in values):
            bits = out.view(np.int32)
            for _, value, place in values:
                bits[place] = value.view(np.int16)  # the sign fills the upper half
            _widen_bits(out.reshape(-1))
            return
        for name, value, place in values:
            if value.dtype == np.int8:
                np.multiply(value, self.scales[name], out=out[place], dtype=np.float32)
            else:
                out[place] = self.float32(name) if value.dtype == np.float16 else value


def with_scales(stored: Mapping[str, Array]) -> StoredTensors:
    """Return the tensors of an adapter's file with int8 codes and their scales put together.

    Raises:
        BundleError: if codes and scales do not go together.
    """
    scales = {name: _scale_of(name, value, stored) for name, value in stored.items() if value.dtype == np.int8}
    _check_scales(scales)
    spent = {name + SCALE_SUFFIX for name in scales}
    return StoredTensors({name: value for name, value in stored.items() if name not in spent}, scales)


def to_float32(stored: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
    """Return what the tensors of an adapter's file stand for, by graph input name; all finite if the file's are.

    Raises:
        BundleError: if int8 codes and scales do not go together.
    """
    tensors = with_scales(stored)
    return {name: tensors.float32(name) for name in tensors.values}


def as_stored(tensors: Mapping[str, Array], dtype: str) -> dict[str, NDArray[np.float32]]:
    """Return what a reader gets back of `tensors`, float32: what a golden is to be measured with."""
    return to_float32(to_stored(tensors, dtype))


def _narrow(wide: Array) -> Array:
    """Return float16 values, or the float32 ones where float16 loses too much."""
    largest = float(np.abs(wide).max(initial=0.0))
    if wide.size == 0 or largest > float(np.finfo(np.float16).max):
        return wide
    narrow = wide.astype(np.float16)
    error = float(np.abs(narrow.astype(np.float32) - wide).max())
    return narrow if error <= _FLOAT16_MAX_ERROR * largest else wide


def _codes(wide: Array) -> tuple[Array, Array] | None:
    """Return int8 codes and their scales, one per index of the shorter of the first two axes: a low-rank term's rank.

    None for what is stored otherwise: vectors, and numbers too small for a float32 scale.
    """
    if wide.ndim < 2 or wide.size == 0:
        return None
    axis = 0 if wide.shape[0] < wide.shape[1] else 1
    others = tuple(i for i in range(wide.ndim) if i != axis)
    largest = np.abs(wide).max(axis=others, keepdims=True)
    scale = (largest / np.float32(_LARGEST_CODE)).astype(np.float32)
    scale[largest == 0] = 1.0
    if (scale < np.finfo(np.float32).tiny).any():
        return None
    return np.rint(wide / scale).astype(np.int8), scale


def _scale_of(name: str, codes: Array, stored: Mapping[str, Array]) -> Array:
    scale = stored.get(name + SCALE_SUFFIX)
    if scale is None or scale.dtype != np.float32:
        raise BundleError(
            f"tensor {name!r} is int8, and {name + SCALE_SUFFIX!r} float32 is missing",
            hint="the adapter's file is damaged or from elsewhere; remove the adapter and add it again",
        )
    if scale.ndim != codes.ndim or any(n not in (1, m) for n, m in zip(scale.shape, codes.shape, strict=True)):
        raise BundleError(
            f"the scales of tensor {name!r} int8{list(codes.shape)} are float32{list(scale.shape)}; each axis must be "
            "1 or the tensor's",
            hint="the adapter's file is damaged or from elsewhere; remove the adapter and add it again",
        )
    return scale


def _check_scales(scales: Mapping[str, Array]) -> None:
    """Refuse scales that make infinity or nothing of their codes; all at once, for there are hundreds of small ones."""
    together = np.concatenate([scale.reshape(-1) for scale in scales.values()]) if scales else np.ones(1, np.float32)
    if together.min() > 0 and together.max() <= _LARGEST_SCALE:
        return
    name = next(n for n, scale in scales.items() if not ((scale > 0) & (scale <= _LARGEST_SCALE)).all())
    raise BundleError(
        f"the scales of tensor {name!r} must be above 0 and at most {_LARGEST_SCALE:.3g}",
        hint="the adapter's file is damaged or from elsewhere; remove the adapter and add it again",
    )


def _widen_bits(values: NDArray[np.float32]) -> None:
    """Make float32[n] in place of finite float16 numbers' bits, each as an int32: moved, then the exponent put right.

    numpy's own conversion takes 5 times as long, and 40 times where numbers are below 6e-5 (measured).
    """
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        moved = block.view(np.int32)
        np.left_shift(moved, 13, out=moved)
        np.bitwise_and(moved, np.int32(-0x70002000), out=moved)  # the sign, 3 zeros, exponent and mantissa
        np.multiply(block, _WIDEN, out=block)
