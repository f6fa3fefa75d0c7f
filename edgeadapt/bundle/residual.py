"""What 4 bits leave of the base's weights, at a low rank, beside whatever adapter is active.

The file `graph/residual.onnx_adapter` holds A_r and B_r of modules with slots. An adapter or a blend then computes
y' = (y + x A_r B_r + (x A) B) * gain + offset: one more part along the rank, no further node. Where an adapter scales a
module's inputs, it scales them for A_r too, which then is a part of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate
from edgeadapt.bundle.bind import bind
from edgeadapt.bundle.manifest import Manifest
from edgeadapt.bundle.prefix import is_prefix_tensor
from edgeadapt.bundle.rules import RESIDUAL_FILE
from edgeadapt.bundle.stored import to_stored
from edgeadapt.onnx_adapter import dump_onnx_adapter

Array = NDArray[Any]


def residual_file(pairs: Mapping[str, tuple[Array, Array]], manifest: Manifest) -> bytes:
    """Return the bytes of a bundle's residual, stored as its adapters are.

    Args:
        pairs: A float32[in, rank] and B float32[rank, out] by module.
        manifest: the bundle's, with a low-rank slot at each of them.
    """
    sites = {path: SiteUpdate(a=a, b=b) for path, (a, b) in pairs.items()}
    inputs = bind(ResolvedAdapter("residual", "residual", sites, {}), manifest)
    return dump_onnx_adapter(to_stored(inputs, manifest.adapter_dtype))


def has_residual(manifest: Manifest) -> bool:
    """Return whether a bundle holds a residual."""
    return RESIDUAL_FILE in manifest.files


def with_residual(inputs: Mapping[str, Array], residual: Mapping[str, Array], manifest: Manifest) -> dict[str, Array]:
    """Return an adapter's or a blend's arrays by input name with the residual's added along the rank.

    An adapter that is but a prefix runs in the plain graph, and stays as it is.
    """
    result = dict(inputs)
    if inputs and all(is_prefix_tensor(name) for name in inputs):
        return result
    for slot in manifest.slots:
        for term, axis in (("a", 1), ("b", 0)):
            name = slot.inputs.get(term, "")
            if name in residual:
                own = residual[name]
                if term == "a" and (input_gain := inputs.get(slot.inputs.get("input_gain", ""))) is not None:
                    own = input_gain[:, None] * own
                parts = [inputs[name], own] if name in inputs else [own]
                result[name] = np.concatenate(parts, axis=axis, dtype=np.float32)
    return result
