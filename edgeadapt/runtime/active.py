"""Which adapter is active, and the graphs and tensors that run it: beside the base, blended, or promoted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from types import EllipsisType
from typing import Any, Literal

from numpy.typing import NDArray

from edgeadapt.adapters.adapter import Prefix
from edgeadapt.bundle.bundle import Bundle
from edgeadapt.errors import FileError, SessionError
from edgeadapt.runtime.cache import AdapterKey
from edgeadapt.runtime.ort import Binding, OrtGraph, Tensor, open_graph
from edgeadapt.runtime.prefixes import ContentKey
from edgeadapt.runtime.prepacked import prepacked_graph
from edgeadapt.runtime.promotion import Graphs, Promoter
from edgeadapt.runtime.residents import Residents, adapter_key

Array = NDArray[Any]


class Active:
    """The adapters of a bundle in memory, of which one, a blend, or none is bound to the open graphs.

    key: what is active; graphs: open, by file; bindings: by role, empty until first needed
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None,
        provider: str,
        keep_graphs: bool,
        share_weights: bool,
        promote_after: int | None,
        promoted_max_bytes: int | None,
    ) -> None:
        self.bundle = bundle
        self.keep_graphs = keep_graphs
        self.share_weights = share_weights
        self.residents = Residents(bundle, mapped=share_weights)
        self.graphs: dict[str, OrtGraph] = {}
        self.bindings: dict[str, Binding] = {}
        self.key: AdapterKey = ()
        self._tensors: Mapping[str, Tensor] = {}  # what `bindings` are made of
        self._resting: dict[AdapterKey, tuple[Mapping[str, Tensor], dict[str, Binding]]] = {}
        self._open = partial(open_graph, threads=threads, provider=provider)
        self.promoter = Promoter(bundle, self._open, max_bytes=promoted_max_bytes, after_tokens=promote_after)
        self._promoted: Graphs | None = None
        self._beside = False  # whether an adapter's tensors are bound

    def close(self) -> None:
        """Free the graphs and the adapters."""
        self.promoter.close()
        self._promoted = None
        self._resting.clear()
        self.bindings.clear()
        self.graphs.clear()
        self.residents = Residents(self.bundle)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters that can be used."""
        return tuple(sorted({*self.bundle.adapter_names, *self.residents.lent}))

    def adapter_of(self, key: AdapterKey) -> str | dict[str, float] | None:
        """Return what `adapter` is while `key` is active."""
        if self.bundle.manifest.merged is not None:
            return self.bundle.manifest.merged
        if len(key) == 1 and key[0][1] == 1.0:
            return key[0][0]
        return dict(key) or None

    def key_of(self, adapter: str | Mapping[str, float] | EllipsisType | None) -> AdapterKey:
        """Return a choice of adapters in the form that caches compare; ... stands for what is active.

        Raises:
            SessionError: for an unknown name, weights that are not numbers, or a merged bundle.
        """
        if adapter is ...:
            return self.key
        merged = self.bundle.manifest.merged
        if merged is None:
            return adapter_key(adapter, self.names)
        if adapter not in (None, merged):
            raise SessionError(
                f"adapter {adapter!r} cannot be used: {merged!r} is merged into the weights of this bundle",
                hint="export without --merge to swap adapters",
            )
        return ()

    def use(self, key: AdapterKey) -> None:
        """Make `key` active; if that fails, what was active before stays so.

        Raises:
            BundleError: if an adapter's file is damaged.
        """
        if self.promoter.graphs(key) is None:
            self._use_slots(key)
        self.key = key
        self._follow_promotion()

    def _use_slots(self, key: AdapterKey) -> None:
        """Bind an adapter beside the base, or the bare base."""
        tensors = self.adapter_tensors(key)
        if not (key == self.key and self._is_bound(tensors)):
            bindings = self._rested(key, tensors)
            if bindings is None:
                bindings = self._bind(tensors, slots=bool(tensors), keep_graphs=self.keep_graphs)
            self._rest()
            self.bindings = bindings
        self._tensors, self._promoted, self._beside = tensors, None, bool(tensors)

    def _is_bound(self, tensors: Mapping[str, Tensor]) -> bool:
        return bool(self.bindings) and self._promoted is None and (tensors is self._tensors or not tensors)

    def _rest(self) -> None:
        """Keep the bindings of what was active, an adapter or the bare base, for when it is used again.

        A blend's tensors are made for one use. Where several graphs work together, or on another device than the CPU,
        bindings are made anew: see `Binding.rest`.
        """
        whole = not self.key or (len(self.key) == 1 and self.key[0][1] == 1.0)
        if whole and self.keep_graphs and self._promoted is None and len(self.bindings) == 1:
            (binding,) = self.bindings.values()
            if binding.graph.device == "cpu":
                binding.rest()
                self._resting[self.key] = self._tensors, self.bindings

    def _rested(self, key: AdapterKey, tensors: Mapping[str, Tensor]) -> dict[str, Binding] | None:
        """Return bindings that wait since `key` was active, if they are of the tensors and graphs that are open now."""
        made_of, bindings = self._resting.pop(key, (None, None))
        if bindings is None or not (made_of is tensors or not (made_of or tensors)):
            return None
        return bindings if all(each.graph in self.graphs.values() for each in bindings.values()) else None

    def evict(self, name: str) -> None:
        """Forget an adapter's tensors and all that is bound to them."""
        self.residents.evict(name)
        self._resting.pop(((name, 1.0),), None)

    def lend(self, name: str, tensors: Mapping[str, Array]) -> None:
        """Know an adapter that is not in the bundle; see `Session.lend`.

        Raises:
            BundleError: if an array is none that an adapter of this bundle may set.
        """
        self.residents.lend(name, tensors)
        self._resting.pop(((name, 1.0),), None)

    def demote(self, adapter: str) -> None:
        """Cancel an adapter's promotion, or close its weights; it goes on beside the base.

        Raises:
            BundleError: if its file is damaged.
        """
        if self._promoted is not None and self.adapter_of(self.key) == adapter:
            self._use_slots(self.key)
        self.promoter.stop(adapter)

    @property
    def form(self) -> Literal["plain", "slots", "promoted"]:
        """What runs: the bare (or merged) base, an adapter beside it, or weights that have an adapter in them.

        An adapter that is but a prefix runs in the bare base.
        """
        if self._promoted is not None:
            return "promoted"
        return "slots" if self._beside else "plain"

    def _follow_promotion(self) -> None:
        """Switch to promoted weights of what is active, if there are new ones."""
        graphs = self.promoter.graphs(self.key)
        if graphs is None or graphs is self._promoted:
            return
        self.bindings = {role: Binding(graph, {}) for role, graph in graphs.items()}
        self._promoted = graphs
        if not self.keep_graphs:
            self.graphs = {}

    def prepare(self) -> None:
        """Open the graphs that the active adapter needs."""
        if not self.bindings:
            self.bindings = self._bind({}, slots=False, keep_graphs=self.keep_graphs)

    def binding(self, role: str) -> Binding:
        """Return a graph with what is active bound to it, in its promoted form once there is one."""
        self.prepare()
        self._follow_promotion()
        return self.bindings[role]

    def fresh_binding(self, role: str) -> Binding:
        """Return a new binding of a slots graph with what is active beside the base, and no outputs yet."""
        return self._bind(self.adapter_tensors(self.key), slots=True)[role]

    def binding_of(self, key: AdapterKey) -> Binding:
        """Return the decoder's graph with the tensors of `key` bound: that of `step` if it is active, else a new one.

        The bare base runs in the slots graph where only that is open.
        """
        if key == self.key:
            return self.binding("decoder")
        record = self.bundle.manifest.graphs["decoder"]
        tensors = self.adapter_tensors(key)
        slots = bool(tensors) or (record.plain not in self.graphs and record.slots in self.graphs)
        return self._bind(tensors, slots=slots)["decoder"]

    def slots_binding(self) -> Binding:
        """Return the decoder's slots graph with no adapter bound."""
        return self._bind({}, slots=True)["decoder"]

    def adapter_tensors(self, key: AdapterKey) -> Mapping[str, Tensor]:
        """Return what `key` binds, float32 by graph input name."""
        return self.residents.tensors(key) if key else {}

    def prefix(self, key: AdapterKey) -> Prefix | None:
        """Return what texts begin with while `key` is active, None if nothing."""
        return self.residents.prefix(key) if key else None

    def content_of(self, key: AdapterKey) -> ContentKey:
        """Return what `key` binds, as digests with weights: the same for the same tensors under any name.

        Promoted weights are rounded anew, so what they compute is a content of its own.
        """
        digests = tuple(sorted((self.residents.digest(name), weight) for name, weight in key))
        return (*digests, ("promoted", 1.0)) if self.is_promoted(key) else digests

    def is_promoted(self, key: AdapterKey) -> bool:
        """Return whether `binding_of` gives promoted weights for `key`."""
        return key == self.key and self._promoted is not None

    def _bind(self, tensors: Mapping[str, Tensor], *, slots: bool, keep_graphs: bool = True) -> dict[str, Binding]:
        """Return a binding per graph with an adapter's tensors bound where the graph takes them."""
        if not keep_graphs:
            wanted = {
                (record.slots if slots else None) or record.plain for record in self.bundle.manifest.graphs.values()
            }
            if not wanted.issuperset(self.graphs):
                self.bindings = {}
                self.graphs = {name: graph for name, graph in self.graphs.items() if name in wanted}
        bindings = {}
        for role, record in self.bundle.manifest.graphs.items():
            name = record.slots if slots and record.slots is not None else record.plain
            if name not in self.graphs:
                self.graphs[name] = self._open_graph(name)
            graph = self.graphs[name]
            bindings[role] = Binding(graph, {key: value for key, value in tensors.items() if key in graph.optional})
        taken = {name for binding in bindings.values() for name in binding.graph.optional}
        unused = [name for name in tensors if name not in taken]
        if unused:
            raise SessionError(
                f"no graph of this bundle takes the adapter's tensor {unused[0]!r}",
                hint="check the bundle with `edgeadapt verify`",
            )
        return bindings

    def _open_graph(self, name: str) -> OrtGraph:
        if self.share_weights:
            try:
                path = prepacked_graph(self.bundle, name)
                return self._open(path)
            except (FileError, SessionError) as error:
                warnings.warn(f"weights are not shared: {error.message}; {error.hint}", stacklevel=2)
                self.share_weights = False
        return self._open(self.bundle.file(name))
