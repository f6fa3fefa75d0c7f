"""Rows of one input with adapters of their own, run one adapter after the other: exact for any model and adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import SessionError

if TYPE_CHECKING:
    from edgeadapt.runtime.session import Session

Array = NDArray[Any]
Adapter = str | Mapping[str, float] | None


def run_groups(
    session: Session, inputs: Mapping[str, Any], adapters: Sequence[Adapter], chunk_size: int | None
) -> dict[str, Array]:
    """Return the outputs of `session.run` with adapter `adapters[i]` for row i of every input and output.

    Raises:
        SessionError: if inputs and adapters have different numbers of rows, or adapters give outputs of different
            shapes (other class counts).
    """
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != len(adapters):
            raise SessionError(
                f"adapters has {len(adapters)} entries, input {name!r} is {array.dtype.name}{list(array.shape)}",
                hint="give one adapter (or None) per row of the inputs",
            )
    results: dict[str, Array] = {}

    def run(rows: list[int]) -> None:
        found = session.run({name: array[rows] for name, array in arrays.items()}, chunk_size=chunk_size)
        for name, output in found.items():
            _scatter(results, name, output, rows, adapters)

    by_adapter(session, adapters, run)
    return results


def by_adapter(session: Session, adapters: Sequence[Adapter], work: Callable[[list[int]], None]) -> None:
    """Call `work` once per adapter, with the rows that use it, while it is active; then restore what was active.

    Raises:
        SessionError: for an unknown adapter, before any work.
    """
    if isinstance(adapters, str | Mapping) or not adapters:
        raise SessionError(f"adapters is {adapters!r}", hint="give a list with one adapter (or None) per row")
    groups: dict[Any, list[int]] = {}
    for row, adapter in enumerate(adapters):
        groups.setdefault(session.active.key_of(adapter), []).append(row)
    before = session.adapter
    try:
        for rows in groups.values():
            session.use(adapters[rows[0]])
            work(rows)
    finally:
        session.use(before)


def _scatter(results: dict[str, Array], name: str, output: Array, rows: list[int], adapters: Sequence[Adapter]) -> None:
    if len(output) != len(rows):
        raise SessionError(
            f"output {name!r} is {output.dtype.name}{list(output.shape)} for {len(rows)} rows of one adapter",
            hint="run the adapters one after the other with session.use",
        )
    if name not in results:
        results[name] = np.zeros((len(adapters), *output.shape[1:]), output.dtype)
    if results[name].shape[1:] != output.shape[1:]:
        raise SessionError(
            f"output {name!r} is {list(output.shape[1:])} a row with adapter {adapters[rows[0]]!r} and "
            f"{list(results[name].shape[1:])} with {adapters[0]!r}; one array cannot hold both",
            hint="run adapters with different outputs in separate calls",
        )
    results[name][rows] = output
