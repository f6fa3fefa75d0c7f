"""An adapter's arrays per module to the inputs of the graphs, where several modules may share a branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.manifest import Manifest
from edgeadapt.slots import Joined, Slot

Array = NDArray[Any]

_ALIGNMENT = 16  # float32 numbers: 64 bytes


Place = tuple[Any, ...]
"""An index into an array."""


class _GraphInput(NamedTuple):
    """One input of a graph: its shape, where in it each of an adapter's arrays lies, and where ones; zeros elsewhere.

    Hundreds are made in a swap, and a named tuple is made in a third of a dataclass's time.
    """

    name: str
    shape: tuple[int, ...]
    parts: Sequence[tuple[str, Place]]
    ones: Sequence[Place] = ()


def assemble(
    inputs: Mapping[str, Array],
    manifest: Manifest,
    fill: Callable[[NDArray[np.float32], Sequence[tuple[str, Place]]], None] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Return float32 arrays by graph input from an adapter's arrays as `bind` gives them.

    Arrays of modules that are computed alone are passed on. Those of a joined product are put together: A side by side,
    B as blocks on the diagonal, gain and offset one after the other, with the identity where a module has none.

    All are views of one array: that is one allocation, of which the system can make large pages.

    Args:
        inputs: arrays by input name of their module.
        manifest: the bundle's.
        fill: writes what some of `inputs` stand for into an array of zeros, each into its place; None if they are
            float32 already.
    """
    layout = [*_joined_inputs(inputs, manifest), *_other_inputs(inputs, manifest)]
    sizes = [-(-math.prod(item.shape) // _ALIGNMENT) * _ALIGNMENT for item in layout]
    whole = np.zeros(sum(sizes), np.float32)
    result: dict[str, NDArray[np.float32]] = {}
    start = 0
    for item, size in zip(layout, sizes, strict=True):
        out = result[item.name] = whole[start : start + math.prod(item.shape)].reshape(item.shape)
        start += size
        if fill is not None:
            fill(out, item.parts)
        else:
            for name, place in item.parts:
                out[place] = inputs[name]
        for place in item.ones:
            out[place] = 1.0
    return result


def _other_inputs(inputs: Mapping[str, Array], manifest: Manifest) -> Iterator[_GraphInput]:
    """Give what is bound as it is: all but the inputs of modules that are part of a joined product in every graph."""
    inside = {(joined.graph, site) for joined in manifest.joined for site in joined.sites}
    spent = {
        name
        for slot in manifest.slots
        if all((role, slot.site) in inside for role in slot.graphs)
        for name in slot.inputs.values()
    }
    for name, value in inputs.items():
        if name not in spent:
            yield _GraphInput(name, value.shape, ((name, (...,)),))


def _joined_inputs(inputs: Mapping[str, Array], manifest: Manifest) -> Iterator[_GraphInput]:
    slots = {slot.site: slot for slot in manifest.slots}
    for joined in manifest.joined:
        members = [slots[site] for site in joined.sites]
        given = {term for slot in members for term, name in slot.inputs.items() if name in inputs}
        if "a" in given:
            yield from _low_rank(joined, members, inputs)
        for term in ("gain", "offset"):
            if term in given:
                yield _side_by_side(joined.inputs[term], term, members, inputs)


def _side_by_side(name: str, term: str, members: list[Slot], inputs: Mapping[str, Array]) -> _GraphInput:
    parts, absent, end = [], [], 0
    for slot in members:
        place = (slice(end, end + slot.out_features),)
        end += slot.out_features
        if slot.inputs[term] in inputs:
            parts.append((slot.inputs[term], place))
        else:
            absent.append(place)
    return _GraphInput(name, (end,), parts, absent if term == "gain" else ())


def _low_rank(joined: Joined, members: list[Slot], inputs: Mapping[str, Array]) -> tuple[_GraphInput, _GraphInput]:
    """Return A float32[in, sum of ranks] and B float32[sum of ranks, sum of outs]."""
    a_parts, b_parts, rank, out = [], [], 0, 0
    for slot in members:
        column, out = out, out + slot.out_features
        a = inputs.get(slot.inputs["a"])
        if a is not None:
            row, rank = rank, rank + a.shape[1]
            a_parts.append((slot.inputs["a"], (slice(None), slice(row, rank))))
            b_parts.append((slot.inputs["b"], (slice(row, rank), slice(column, out))))
    return (
        _GraphInput(joined.inputs["a"], (members[0].in_features, rank), a_parts),
        _GraphInput(joined.inputs["b"], (rank, out), b_parts),
    )
