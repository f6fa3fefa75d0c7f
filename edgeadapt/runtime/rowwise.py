"""One adapter per row of a batch, in one run of the slots graph.

A slot's inputs feed plain products, and these broadcast: A float32[rows, in, rank] and B float32[rows, rank, out] give
every row its own low-rank term, a gain or offset float32[rows, 1, out] its own channels, an input gain
float32[rows, 1, in] its own inputs. Ranks are filled up with
zeros. Tables that are looked up (embeddings), kernels of convolutions and replaced parameters do not broadcast; the
graph says which inputs do by declaring no shape for them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.bottlenecks import bottleneck_inputs
from edgeadapt.bundle.branches import branch_inputs
from edgeadapt.bundle.manifest import Manifest
from edgeadapt.runtime.cache import AdapterKey
from edgeadapt.runtime.ort import Binding, Rows, Tensor, TensorInfo
from edgeadapt.slots import ROWWISE_TYPES, Joined, Slot

if TYPE_CHECKING:
    from edgeadapt.runtime.session import Session

Array = NDArray[Any]
_ALIGNED = 16
"""Floats of a cache line: a tensor begins at one."""


class RowAdapters:
    """The tensors of each row's adapter, stacked; a row joins or leaves by writing its own slice in place.

    keys: which adapter each row holds, None for a row that was never set
    """

    def __init__(self, rows: int, manifest: Manifest) -> None:
        self.keys: list[AdapterKey | None] = [None] * rows
        places: tuple[Slot | Joined, ...] = (*manifest.slots, *manifest.joined)
        terms = ("gain", "input_gain")
        self._gains = {place.inputs[term] for place in places for term in terms if term in place.inputs}
        self._stacked: dict[str, Tensor] = {}
        self._set: list[set[str]] = [set() for _ in range(rows)]  # names that are not neutral, by row
        self._views: dict[tuple[int, int], dict[str, Tensor | Rows]] = {}

    def reserve(self, adapters: Iterable[Mapping[str, Array]]) -> None:
        """Make room for adapters that `put` will be given, at once: what grows is copied."""
        sizes = {name: stacked.shape[1:] for name, stacked in self._stacked.items()}
        for tensors in adapters:
            for name, value in tensors.items():
                shape = _matrix(value).shape
                sizes[name] = tuple(max(pair) for pair in zip(sizes.get(name, shape), shape, strict=True))
        grown = {
            name: (len(self.keys), *size)
            for name, size in sizes.items()
            if name not in self._stacked or self._stacked[name].shape[1:] != size
        }
        if not grown:
            return
        for name, array in _zeros(grown).items():
            if name in self._gains:
                array[...] = 1
            if name in self._stacked:
                old = self._stacked[name].numpy()
                array[:, : old.shape[1], : old.shape[2]] = old
            self._stacked[name] = Tensor(array)
        self._views = {}

    def put(self, row: int, key: AdapterKey, tensors: Mapping[str, Array]) -> None:
        """Give row `row` an adapter: 2-D A and B and vectors by graph input name, as `bundle.bind` gives them."""
        self.reserve([tensors])
        for name in self._set[row] - tensors.keys():
            self._stacked[name].numpy()[row] = self._neutral(name)
        for name, given in tensors.items():
            value, place = _matrix(given), self._stacked[name].numpy()[row]
            height, width = value.shape
            place[:height, :width] = value
            place[:height, width:] = place[height:] = self._neutral(name)
        self._set[row] = set(tensors)
        self.keys[row] = key

    def part(self, first: int, count: int) -> Mapping[str, Tensor | Rows]:
        """Return some rows' tensors by graph input name, the same mapping at each call until one must grow."""
        if (first, count) not in self._views:
            self._views[first, count] = {name: stacked.rows(first, count) for name, stacked in self._stacked.items()}
        return self._views[first, count]

    def _neutral(self, name: str) -> float:
        return 1.0 if name in self._gains else 0.0


def _zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Return zeros by name, side by side in one piece of memory.

    numpy asks for large pages for one large piece: sixteen adapters (466 MB) are stacked in 60 ms, else in 200.
    """
    sizes = {name: -(-math.prod(shape) // _ALIGNED) * _ALIGNED for name, shape in shapes.items()}
    memory = np.zeros(sum(sizes.values()), np.float32)
    starts = itertools.accumulate(sizes.values(), initial=0)
    return {
        name: memory[start : start + math.prod(shape)].reshape(shape)
        for (name, shape), start in zip(shapes.items(), starts, strict=False)
    }


def _matrix(value: Array) -> Array:
    """Return a slot's tensor with two axes: vectors become float32[1, out]."""
    return value[None] if value.ndim == 1 else value


def obstacle(names: set[str], inputs: Mapping[str, TensorInfo], manifest: Manifest) -> str | None:
    """Return why rows cannot differ in these adapter inputs within one run, None if they can.

    Args:
        names: adapter inputs that any row's adapter sets.
        inputs: the slots graph's optional inputs.
        manifest: the bundle's.
    """
    kinds = {name: (slot.site, slot.type) for slot in manifest.slots for name in slot.inputs.values()}
    kinds |= {name: ("+".join(joined.sites), "linear") for joined in manifest.joined for name in joined.inputs.values()}
    beside, branches = bottleneck_inputs(manifest), branch_inputs(manifest)
    for name in sorted(names):
        if name in beside:
            return f"a bottleneck beside module {beside[name]!r} is one for all rows"
        if name in branches:
            return f"a network beside module {branches[name]!r} is one for all rows"
        if name not in kinds:
            return f"parameter {name!r} is replaced whole, for all rows at once"
        site, kind = kinds[name]
        if kind not in ROWWISE_TYPES:
            return f"module {site!r} is of type {kind!r}, which takes one adapter for all rows"
        if name in inputs and inputs[name].shape:
            return f"this bundle's graph takes one {name!r} for all rows; another export may take more"
    return None


class RowBindings:
    """The decoder's graphs with the adapters that the rows of one batch use.

    obstacle: why the rows' adapters cannot share a run, None where they can
    """

    def __init__(self, session: Session, rows: int) -> None:
        self._session = session
        self._one: dict[AdapterKey, Binding] = {}
        self._bound_keys: dict[AdapterKey, AdapterKey] = {}
        self._stack = RowAdapters(rows, session.bundle.manifest)
        self._mixed: Binding | None = None
        self._bound: Mapping[str, Tensor | Rows] | None = None
        self._last: tuple[int, Sequence[AdapterKey], Binding | None] = (0, (), None)
        self.obstacle: str | None = None

    def one(self, key: AdapterKey) -> Binding:
        """Return the graph with one adapter for all rows."""
        if key == self._session.active.key:
            return self._session.active.binding_of(key)
        if key not in self._one:
            self._one[key] = self._session.active.binding_of(key)
        return self._one[key]

    def several(self, keys: Sequence[AdapterKey], first: int = 0) -> Binding | None:
        """Return the graph for rows `first`, `first` + 1, ... with these adapters, None where they cannot share a run.

        Rows with the same one share it; else each has its own, in the slots graph.
        """
        if all(key == keys[0] for key in keys):
            return self.one(keys[0])
        keys = [self._bound_key(key) for key in keys]
        if all(key == keys[0] for key in keys):
            return self.one(keys[0])
        if (first, keys) != self._last[:2]:
            self._last = (first, list(keys), self._bind(keys, first))
        return self._last[2]

    def _bound_key(self, key: AdapterKey) -> AdapterKey:
        """Return the key of the base for adapters that set no input: their prefix lies in the cache's rows."""
        if key not in self._bound_keys:
            active = self._session.active
            alone = active.prefix(key) is not None and not active.adapter_tensors(key)
            self._bound_keys[key] = () if alone else key
        return self._bound_keys[key]

    def _bind(self, keys: Sequence[AdapterKey], first: int) -> Binding | None:
        joining = {row: key for row, key in enumerate(keys, first) if self._stack.keys[row] != key}
        tensors = {key: self._session.active.adapter_tensors(key) for key in set(joining.values())}
        names = {name for of_one in tensors.values() for name in of_one}
        if self._mixed is None:
            self._mixed = self._session.active.slots_binding()
        self.obstacle = obstacle(names, self._mixed.graph.optional, self._session.bundle.manifest)
        if self.obstacle is not None:
            return None
        arrays = {key: {name: tensor.numpy() for name, tensor in of_one.items()} for key, of_one in tensors.items()}
        self._stack.reserve(arrays.values())
        for row, key in joining.items():
            self._stack.put(row, key, arrays[key])
        wanted = self._stack.part(first, len(keys))
        if wanted is not self._bound:
            for name, tensor in wanted.items():
                self._mixed.set_input(name, tensor)
            self._bound = wanted
        return self._mixed
