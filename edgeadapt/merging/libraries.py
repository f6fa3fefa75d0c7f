"""The libraries that save adapters, at work on one base: each adapter is read by its own."""

from __future__ import annotations

from collections.abc import Mapping

from edgeadapt.adapters.adapter import Adapter, Array, Effective, Library
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.hub_library import HubLibrary
from edgeadapt.merging.library import PeftLibrary


class Libraries:
    """The library of whatever adapter is asked about; see `edgeadapt.adapters.adapter.Library`."""

    def __init__(self, base: BaseModel) -> None:
        """Load nothing yet."""
        self._peft, self._hub = PeftLibrary(base), HubLibrary(base)

    def effective(self, adapter: Adapter) -> Mapping[str, Effective]:
        """Return every module of the base that computes something else with the adapter inside, by its path."""
        return self._of(adapter).effective(adapter)

    def past(self, adapter: Adapter) -> tuple[tuple[Array, Array], ...]:
        """Return the key and value that the adapter puts before each layer's own, float32[heads, tokens, dim]."""
        return self._of(adapter).past(adapter)

    def _of(self, adapter: Adapter) -> Library:
        return self._hub if adapter.layout == "adapterhub" else self._peft
