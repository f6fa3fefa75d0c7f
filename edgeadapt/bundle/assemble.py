"""An adapter's arrays per module to the inputs of the graphs, where several modules may share a branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.manifest import Manifest
from edgeadapt.slots import Joined, Slot

Array = NDArray[Any]


def assemble(inputs: Mapping[str, Array], manifest: Manifest) -> dict[str, Array]:
    """Return float32 arrays by graph input from an adapter's arrays as `bind` gives them.

    Arrays of modules that are computed alone are passed on as they are. Those of a joined product are put together: A
    side by side, B as blocks on the diagonal, gain and offset one after the other, with the identity where a module has
    none.
    """
    slots = {slot.site: slot for slot in manifest.slots}
    result = dict(inputs)
    for joined in manifest.joined:
        members = [slots[site] for site in joined.sites]
        if any(name in inputs for member in members for name in member.inputs.values()):
            result |= _joined(joined, members, inputs)
    inside = {(joined.graph, site) for joined in manifest.joined for site in joined.sites}
    for slot in manifest.slots:
        if all((role, slot.site) in inside for role in slot.graphs):
            for name in slot.inputs.values():
                result.pop(name, None)
    return result


def _joined(joined: Joined, members: list[Slot], inputs: Mapping[str, Array]) -> dict[str, Array]:
    result: dict[str, Array] = {}
    given = {term for slot in members for term, name in slot.inputs.items() if name in inputs}
    if "a" in given:
        result[joined.inputs["a"]], result[joined.inputs["b"]] = _low_rank(members, inputs)
    for term, identity in (("gain", np.ones), ("offset", np.zeros)):
        if term in given:
            parts = [inputs.get(slot.inputs[term], identity(slot.out_features, np.float32)) for slot in members]
            result[joined.inputs[term]] = np.concatenate(parts)
    return result


def _low_rank(members: list[Slot], inputs: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return A float32[in, sum of ranks] and B float32[sum of ranks, sum of outs]."""
    parts = [(inputs.get(slot.inputs["a"]), slot) for slot in members]
    rank = sum(a.shape[1] for a, _ in parts if a is not None)
    joined_a = np.empty((members[0].in_features, rank), np.float32)
    joined_b = np.zeros((rank, sum(slot.out_features for slot in members)), np.float32)
    row = column = 0
    for a, slot in parts:
        if a is not None:
            end = row + a.shape[1]
            joined_a[:, row:end] = a
            joined_b[row:end, column : column + slot.out_features] = inputs[slot.inputs["b"]]
            row = end
        column += slot.out_features
    return joined_a, joined_b
