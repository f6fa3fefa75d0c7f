"""Whether a tensor that travels with an adapter is the base's own weight."""

from __future__ import annotations

import hashlib

import numpy as np

from edgeadapt.adapters.adapter import Array, TargetModule, TensorRef


def digest_of(weight: Array) -> str:
    """Return the SHA-256 (hex) of the array's float32 bytes, little endian, in C order."""
    return hashlib.sha256(np.ascontiguousarray(weight, dtype="<f4").tobytes()).hexdigest()


def is_base_copy(tensor: TensorRef, module: TargetModule) -> bool:
    """Tell whether `tensor` is the module's weight, rounded to the tensor's own dtype.

    Without the base's values (in a bundle) only an exact copy can be recognized.
    """
    if tensor.shape != module.weight_shape:
        return False
    saved = tensor.read()
    if digest_of(saved) == module.digest:
        return True
    if module.weight is None or tensor.dtype not in ("F16", "BF16"):
        return False
    base = module.weight()
    rounded = base.astype(np.float16).astype(np.float32) if tensor.dtype == "F16" else _to_bfloat16(base)
    return bool(np.array_equal(rounded, saved))


def _to_bfloat16(values: Array) -> Array:
    """Return float32 values rounded to bfloat16, to nearest and ties to even, as torch does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
