"""How long work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Someone who watches a pipeline: a terminal, or nobody."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Enter a named part of the work, which ends with the `with` block. Stages may be nested."""
        ...

    def advance(self, done: int, total: int) -> None:
        """Say that `done` of `total` equal steps of the current stage are finished."""
        ...

    def note(self, message: str) -> None:
        """Tell people something that they should know and that is no error."""
        ...


class Silent:
    """A listener that does nothing: the default of every function that takes a `Progress`."""

    def stage(self, name: str) -> AbstractContextManager[None]:  # noqa: ARG002 - the protocol's names
        """Return a context that does nothing."""
        return nullcontext()

    def advance(self, done: int, total: int) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""


SILENT = Silent()
