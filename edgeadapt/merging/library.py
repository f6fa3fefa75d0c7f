"""peft itself on the base in torch: what an adapter computes, read off peft's own forward instead of from a formula."""

from __future__ import annotations

from collections.abc import Mapping

from edgeadapt.adapters.adapter import Adapter, Array, Effective
from edgeadapt.errors import AdapterError
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.past import past_of


class PeftLibrary:
    """peft at work on one base; see `edgeadapt.adapters.adapter.Library`."""

    def __init__(self, base: BaseModel) -> None:
        """Load nothing yet."""
        self._base = base

    def effective(self, adapter: Adapter) -> Mapping[str, Effective]:
        """Return every module of the base that computes something else with the adapter inside, by its path.

        Raises:
            AdapterError: always, so far.
        """
        raise AdapterError(f"adapter {adapter.name!r} cannot be read through peft yet", hint="use another kind")

    def past(self, adapter: Adapter) -> tuple[tuple[Array, Array], ...]:
        """Return the key and value that the adapter puts before each layer's own, float32[heads, tokens, dim].

        Raises:
            AdapterError: if the base is no decoder-only language model, or the adapter is for one of another shape.
            MergeError: if peft cannot load it, or the base with these keys and values is not what peft computes.
        """
        return past_of(self._base, adapter)
