"""edgeadapt's own Session over ONNX Runtime, as apps in Python use it; the device has edgeadapt."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeadapt.runtime import Session, open_session, ort

Array = Any


def version() -> str:
    """Return ONNX Runtime's version."""
    return ort.version()


class Engine:
    """A session over the bundle in the options `bundle`, `provider`, `threads` (and `files`, for cold loads)."""

    def __init__(self, _folder: str, job: dict[str, Any], tensors: dict[str, Array]) -> None:
        self._options = {name: value for name, value in job["options"].items() if name != "files"}
        self._bundle = self._options.pop("bundle")
        self._inputs = {name: tensors[key] for name, key in job["inputs"].items()}
        self._session: Session | None = None
        self._cache: Any = None

    @property
    def _open(self) -> Session:
        assert self._session is not None, "open() comes first"
        return self._session

    def open(self) -> None:
        """Open the bundle."""
        self._session = open_session(self._bundle, **self._options)

    def use(self, adapter: str | None) -> None:
        """Make an adapter active, with the graphs that it needs open."""
        self._open.use(adapter)
        self._open.prepare()

    def idle(self) -> None:
        """Have adapters loaded, and none active."""
        self._open.use(None)

    def evict(self, adapter: str) -> None:
        """Forget an adapter's tensors."""
        self._open.evict(adapter)

    def blend(self, weights: dict[str, float]) -> None:
        """Make a weighted blend active."""
        self._open.use(weights)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run a single pass."""
        return self._open.run(inputs)

    def start(self, ids: Array, capacity: int) -> Array:
        """Begin a text; see `engines`."""
        session = self._open
        if session.has_encoder:
            self._cache = session.encode(self._inputs, max_length=capacity)
        else:
            self._cache = session.new_cache(len(ids), capacity)
        return self._last(ids)

    def step(self, ids: Array) -> Array:
        """Go on by one token; see `engines`."""
        return self._last(ids)

    def _last(self, ids: Array) -> Array:
        return np.asarray(self._open.step(ids, self._cache, logits="last"))[:, -1]

    def close(self) -> None:
        """Close the session."""
        self._cache = None
        if self._session is not None:
            self._session.close()
