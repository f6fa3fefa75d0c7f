"""Adapters of a bundle that are in memory, ready to be bound."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from edgeadapt.adapters.adapter import Prefix
from edgeadapt.bundle.assemble import assemble
from edgeadapt.bundle.bind import check_inputs
from edgeadapt.bundle.blend import blend
from edgeadapt.bundle.bundle import Bundle
from edgeadapt.bundle.cache_scales import prefix_codes, read_cache_scales
from edgeadapt.bundle.prefix import is_prefix_tensor, prefix_of
from edgeadapt.errors import FileError, SessionError
from edgeadapt.runtime.cache import AdapterKey
from edgeadapt.runtime.checks import is_finite
from edgeadapt.runtime.ort import Tensor
from edgeadapt.runtime.prepacked import mapped_adapter
from edgeadapt.runtime.spec import decoder_spec

Array = NDArray[Any]


class Residents:
    """Each adapter's tensors are read from its file once and kept as the graphs take them, float32, until `evict`.

    mapped: they lie in a file of the device's cache, and take no memory of this process.
    """

    def __init__(self, bundle: Bundle, *, mapped: bool = False) -> None:
        self._bundle = bundle
        self._mapped = mapped
        self._ready: dict[str, dict[str, Tensor]] = {}
        self._prefixes: dict[str, Prefix] = {}
        self._lent: dict[str, dict[str, Array]] = {}

    def tensors(self, key: AdapterKey) -> Mapping[str, Tensor]:
        """Return float32 tensors by graph input name for one adapter or a blend.

        Raises:
            BundleError: if a file is damaged or holds what is no slot of this bundle, a prefix does not fit a cache in
                int8, or a blend is impossible.
        """
        if len(key) == 1 and key[0][1] == 1.0:
            name = key[0][0]
            if name not in self._ready:
                arrays = self._assembled(name)
                if (prefix := prefix_of(name, arrays)) is not None:
                    self._prefixes[name] = self._held(name, prefix)
                self._ready[name] = _bound(arrays)
            return self._ready[name]
        parts = [(weight, self._arrays(name)) for name, weight in key]
        blended = self._bundle.repaired(blend(parts, self._bundle.manifest))
        return _bound(assemble(blended, self._bundle.manifest))

    def _held(self, name: str, prefix: Prefix) -> Prefix:
        """Return a prefix as the cache holds it."""
        spec = decoder_spec(self._bundle.manifest)
        if spec is None or spec.cache_dtype == "float32":
            return prefix
        return prefix_codes(name, prefix, read_cache_scales(self._bundle, spec))

    def prefix(self, key: AdapterKey) -> Prefix | None:
        """Return what texts of one adapter or a blend begin with; only an adapter alone begins with anything.

        Raises:
            BundleError: if a file is damaged.
        """
        alone = [(name, weight) for name, weight in key if weight != 0]
        if len(alone) != 1 or alone[0][1] != 1.0 or not self._prefix_tokens(alone[0][0]):
            return None  # no file is read for that
        self.tensors(tuple(alone))
        return self._prefixes[alone[0][0]]

    @property
    def longest_prefix(self) -> int:
        """How many virtual tokens a row may have to begin with, whichever adapter is used for it."""
        return max((self._prefix_tokens(name) for name in {*self._lent, *self._bundle.manifest.adapters}), default=0)

    def _prefix_tokens(self, name: str) -> int:
        if name in self._lent:
            prefix = prefix_of(name, self._lent[name])
            return 0 if prefix is None else prefix.tokens
        record = self._bundle.manifest.adapters.get(name)
        return 0 if record is None else record.prefix_tokens

    def digest(self, name: str) -> str:
        """Return the SHA-256 of an adapter's file, or of what was lent: equal digests, equal tensors."""
        if name not in self._lent:
            return self._bundle.manifest.files[f"adapters/{name}/adapter.onnx_adapter"].sha256
        total = hashlib.sha256()
        for slot, value in sorted(self._lent[name].items()):
            total.update(f"{slot} {value.shape}\n".encode())
            total.update(value.tobytes())
        return total.hexdigest()

    @property
    def lent(self) -> tuple[str, ...]:
        """Adapters that are not in the bundle."""
        return tuple(self._lent)

    def lend(self, name: str, tensors: Mapping[str, Array]) -> None:
        """Know an adapter that is not in the bundle, from float32 arrays by graph input name.

        Raises:
            BundleError: if an array is none that an adapter of this bundle may set.
        """
        self._lent[name] = check_inputs(name, tensors, self._bundle.manifest)
        self._ready.pop(name, None)
        self._prefixes.pop(name, None)

    def evict(self, name: str) -> bool:
        """Forget an adapter's tensors; return whether there were any."""
        known = {name} & (self._lent.keys() | self._ready.keys())
        self._lent.pop(name, None)
        self._ready.pop(name, None)
        self._prefixes.pop(name, None)
        return bool(known)

    def _arrays(self, name: str) -> Mapping[str, Array]:
        """Return an adapter's arrays by module; the bundle checks digest, names, shapes and values, ONNX Runtime none.

        They are not kept: a blend reads them again, and one adapter alone needs only what is put together of them.
        """
        return self._lent[name] if name in self._lent else self._bundle.adapter_tensors(name)

    def _assembled(self, name: str) -> Mapping[str, Array]:
        if self._mapped and name not in self._lent:
            try:
                return mapped_adapter(self._bundle, name)
            except FileError as error:
                warnings.warn(f"adapters are not shared: {error.message}; {error.hint}", stacklevel=2)
                self._mapped = False
        if name in self._lent:
            return assemble(self._bundle.repaired(self._lent[name]), self._bundle.manifest)
        return self._bundle.graph_tensors(name)


def _bound(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """Return what goes into graphs; prefixes go into caches."""
    return {name: Tensor(value) for name, value in arrays.items() if not is_prefix_tensor(name)}


def adapter_key(adapter: str | Mapping[str, float] | None, known: tuple[str, ...]) -> AdapterKey:
    """Return a choice of adapters in the form that sessions and caches compare.

    Raises:
        SessionError: for an unknown name, or weights that are not finite numbers.
    """
    if adapter is None:
        return ()
    parts: object = {adapter: 1.0} if isinstance(adapter, str) else adapter
    hint = f"adapters in this bundle: {', '.join(known)}" if known else "this bundle holds no adapter: edgeadapt add"
    if not isinstance(parts, Mapping) or not parts:
        raise SessionError(
            f"adapter is {adapter!r}", hint="give a name, weights by name ({'a': 0.7, 'b': 0.3}), or None for the base"
        )
    for name, weight in parts.items():
        if name not in known:
            raise SessionError(f"unknown adapter {name!r}", hint=hint)
        if not is_finite(weight):
            raise SessionError(f"the weight of adapter {name!r} is {weight!r}", hint="give a finite number such as 0.7")
    return tuple(sorted((name, float(weight)) for name, weight in parts.items()))
