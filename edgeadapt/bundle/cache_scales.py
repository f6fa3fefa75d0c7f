"""Scales of a key-value cache in int8, which lie in the weights file one after the other, and prefixes as its codes.

A session needs them for prefixes alone: what the model reads, the graph rounds itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.adapters.adapter import Prefix
from edgeadapt.bundle.bundle import Bundle
from edgeadapt.bundle.rules import WEIGHTS_FILE
from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import BundleError, FileError

Array = NDArray[Any]
_LARGEST_CODE = 127


def read_cache_scales(bundle: Bundle, spec: DecoderSpec) -> NDArray[np.float32]:
    """Return the scales of a cache in int8, float32[layers, 2, heads, 1, dim]: of keys and values.

    Raises:
        BundleError: if a scale is no number above 0.
        FileError: if the file cannot be read.
    """
    shape = (spec.cache_layers, 2, spec.cache_heads, 1, spec.cache_head_dim)
    path = bundle.file(WEIGHTS_FILE)
    try:
        scales = np.fromfile(path, "<f4", int(np.prod(shape)), offset=spec.cache_scales or 0).reshape(shape)
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {error}", hint="run `edgeadapt verify` on the bundle") from error
    if not np.isfinite(scales).all() or scales.min() <= 0:
        raise BundleError(
            f"{path}: a scale of the key-value cache is no number above 0", hint="export the bundle or copy it again"
        )
    return scales.astype(np.float32)


def prefix_codes(name: str, prefix: Prefix, scales: NDArray[np.float32]) -> Prefix:
    """Return a prefix as a cache in int8 holds it, int8[heads, tokens, dim].

    Args:
        name: the adapter's.
        prefix: float32, of the cache's shape.
        scales: see `read_cache_scales`.

    Raises:
        BundleError: if a value is larger than the cache can hold.
    """
    keys = tuple(_codes(name, f"prefix.{i}.key", x, scales[i, 0]) for i, x in enumerate(prefix.keys))
    values = tuple(_codes(name, f"prefix.{i}.value", x, scales[i, 1]) for i, x in enumerate(prefix.values))
    return Prefix(keys, values)


def _codes(name: str, tensor: str, values: Array, scales: NDArray[np.float32]) -> NDArray[np.int8]:
    codes = np.rint(values / scales)
    worst = np.unravel_index(np.abs(codes).argmax(), codes.shape)
    if abs(codes[worst]) > _LARGEST_CODE:
        most = _LARGEST_CODE * float(scales[worst[0], 0, worst[2]])
        raise BundleError(
            f"adapter {name!r}: {tensor!r} holds {float(values[worst]):.3g}, and this bundle's key-value cache in int8 "
            f"holds {most:.3g} there at most",
            hint="export the bundle again together with this adapter, so that its range is known, or without "
            "--kv-cache int8",
        )
    return codes.astype(np.int8)
