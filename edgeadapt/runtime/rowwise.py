"""One adapter per row of a batch, in one run of the slots graph.

A slot's inputs feed plain products, and these broadcast: A float32[rows, in, rank] and B float32[rows, rank, out] give
every row its own low-rank term, a gain or offset float32[rows, 1, out] its own channels. Ranks are filled up with
zeros. Tables that are looked up (embeddings), kernels of convolutions and replaced parameters do not broadcast; the
graph says which inputs do by declaring no shape for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.manifest import Manifest
from edgeadapt.runtime.cache import AdapterKey
from edgeadapt.runtime.ort import Binding, Rows, Tensor, TensorInfo
from edgeadapt.slots import ROWWISE_TYPES, Joined, Slot

if TYPE_CHECKING:
    from edgeadapt.runtime.session import Session

Array = NDArray[Any]


class RowAdapters:
    """The tensors of each row's adapter, stacked; a row joins or leaves by writing its own slice in place.

    keys: which adapter each row holds, None for a row that was never set
    """

    def __init__(self, rows: int, manifest: Manifest) -> None:
        self.keys: list[AdapterKey | None] = [None] * rows
        places: tuple[Slot | Joined, ...] = (*manifest.slots, *manifest.joined)
        self._gains = {place.inputs["gain"] for place in places if "gain" in place.inputs}
        self._stacked: dict[str, Tensor] = {}
        self._views: dict[int, dict[str, Tensor | Rows]] = {}

    def put(self, row: int, key: AdapterKey, tensors: Mapping[str, Array]) -> None:
        """Give row `row` an adapter: 2-D A and B and vectors by graph input name, as `bundle.bind` gives them."""
        for name, value in tensors.items():
            self._make_room(name, _matrix(value).shape)
        for name, stacked in self._stacked.items():
            place = stacked.numpy()[row]
            place[...] = self._neutral(name)
            if name in tensors:
                value = _matrix(tensors[name])
                place[: value.shape[0], : value.shape[1]] = value
        self.keys[row] = key

    def first(self, rows: int) -> Mapping[str, Tensor | Rows]:
        """Return the first `rows` rows' tensors by graph input name, the same mapping until one must grow."""
        if rows not in self._views:
            self._views[rows] = {name: stacked.rows(0, rows) for name, stacked in self._stacked.items()}
        return self._views[rows]

    def _make_room(self, name: str, shape: tuple[int, ...]) -> None:
        old = self._stacked.get(name)
        size = shape if old is None else tuple(np.maximum(old.shape[1:], shape).tolist())
        if old is not None and size == old.shape[1:]:
            return
        array = np.full((len(self.keys), *size), self._neutral(name), np.float32)
        if old is not None:
            array[:, : old.shape[1], : old.shape[2]] = old.numpy()
        self._stacked[name] = Tensor(array)
        self._views = {}

    def _neutral(self, name: str) -> float:
        return 1.0 if name in self._gains else 0.0


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
    for name in sorted(names):
        if name not in kinds:
            return f"parameter {name!r} is replaced whole, for all rows at once"
        site, kind = kinds[name]
        if kind not in ROWWISE_TYPES:
            return f"module {site!r} is of type {kind!r}, which takes one adapter for all rows"
        if name in inputs and inputs[name].shape:
            return f"this bundle's graph takes one {name!r} for all rows: export it again"
    return None


class RowBindings:
    """The decoder's graphs with the adapters that the rows of one batch use.

    obstacle: why the rows' adapters cannot share a run, None where they can
    """

    def __init__(self, session: Session, rows: int) -> None:
        self._session = session
        self._one: dict[AdapterKey, Binding] = {}
        self._stack = RowAdapters(rows, session.bundle.manifest)
        self._mixed: Binding | None = None
        self._bound: Mapping[str, Tensor | Rows] | None = None
        self._last: tuple[Sequence[AdapterKey], Binding | None] = ((), None)
        self.obstacle: str | None = None

    def one(self, key: AdapterKey) -> Binding:
        """Return the graph with one adapter for all rows."""
        if key == self._session.active.key:
            return self._session.active.binding_of(key)
        if key not in self._one:
            self._one[key] = self._session.active.binding_of(key)
        return self._one[key]

    def several(self, keys: Sequence[AdapterKey]) -> Binding | None:
        """Return the slots graph with an adapter per row, None where the adapters cannot share a run."""
        if keys != self._last[0]:
            self._last = (list(keys), self._bind(keys))
        return self._last[1]

    def _bind(self, keys: Sequence[AdapterKey]) -> Binding | None:
        tensors = {key: self._session.active.adapter_tensors(key) for key in keys}
        names = {name for of_one in tensors.values() for name in of_one}
        if self._mixed is None:
            self._mixed = self._session.active.slots_binding()
        self.obstacle = obstacle(names, self._mixed.graph.optional, self._session.bundle.manifest)
        if self.obstacle is not None:
            return None
        for row, key in enumerate(keys):
            if self._stack.keys[row] != key:
                self._stack.put(row, key, {name: tensor.numpy() for name, tensor in tensors[key].items()})
        wanted = self._stack.first(len(keys))
        if wanted is not self._bound:
            for name, tensor in wanted.items():
                self._mixed.set_input(name, tensor)
            self._bound = wanted
        return self._mixed
