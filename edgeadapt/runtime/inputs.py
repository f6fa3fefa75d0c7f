"""A caller's arrays, made what a graph expects or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import SessionError
from edgeadapt.runtime.ort import TensorInfo
from edgeadapt.slots import GraphRecord

Array = NDArray[Any]


def checked_inputs(given: Mapping[str, Any], expected: Mapping[str, TensorInfo]) -> dict[str, Array]:
    """Return `given` as arrays of the expected dtypes.

    Whole numbers become int64 and floats float32 where the graph wants those; nothing else is converted. Axes that
    share a name ("batch") must share a length.

    Raises:
        SessionError: naming the input and what is expected: it is unknown, missing, or has a wrong dtype or shape.
    """
    hint = "this model takes " + "; ".join(f"{name} {info}" for name, info in expected.items())
    unknown = [name for name in given if name not in expected]
    if unknown:
        raise SessionError(f"unknown input {unknown[0]!r}", hint=hint)
    missing = [name for name in expected if name not in given]
    if missing:
        raise SessionError(f"input {missing[0]!r} is missing", hint=hint)
    arrays = {name: _cast(name, given[name], info, hint) for name, info in expected.items()}
    axes: dict[str, tuple[int, str]] = {}
    for name, info in expected.items():
        _check_shape(name, arrays[name], info, axes, hint)
    return arrays


def _cast(name: str, value: Any, info: TensorInfo, hint: str) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise SessionError(f"input {name!r} is not an array: {error}", hint=hint) from error
    if array.dtype == info.dtype:
        return array
    allowed = {"i": "iub", "f": "f", "b": "b"}.get(info.dtype.kind, "")
    if array.dtype.kind not in allowed or (array.size and array.dtype.kind == "u" and int(array.max()) >= 2**63):
        raise SessionError(f"input {name!r} is {array.dtype.name}{list(array.shape)}, expected {info}", hint=hint)
    return array.astype(info.dtype)


def _check_shape(name: str, array: Array, info: TensorInfo, axes: dict[str, tuple[int, str]], hint: str) -> None:
    fixed = [axis for axis in info.shape if isinstance(axis, int)]
    found = [length for length, axis in zip(array.shape, info.shape, strict=False) if isinstance(axis, int)]
    if array.ndim != len(info.shape) or found != fixed or array.size == 0:
        raise SessionError(f"input {name!r} is {array.dtype.name}{list(array.shape)}, expected {info}", hint=hint)
    for length, axis in zip(array.shape, info.shape, strict=True):
        if not isinstance(axis, str):
            continue
        first, owner = axes.setdefault(axis, (length, name))
        if first != length:
            raise SessionError(
                f"axis {axis!r} is {length} in input {name!r} and {first} in input {owner!r}; they must agree",
                hint=hint,
            )


def inputs_by_role(inputs: Mapping[str, Any], graphs: Mapping[str, GraphRecord]) -> dict[str, dict[str, Any]]:
    """Return the inputs of each graph that is to run: of every one of which something is given, else of the first.

    What no graph knows goes to the first of them, which refuses it by name.
    """
    if len(graphs) == 1:
        return {role: dict(inputs) for role in graphs}
    roles = [role for role, record in graphs.items() if not inputs.keys().isdisjoint(record.inputs)] or list(graphs)[:1]
    known = {name for role in roles for name in graphs[role].inputs}
    strange = {name: value for name, value in inputs.items() if name not in known}
    found = {role: {key: value for key, value in inputs.items() if key in graphs[role].inputs} for role in roles}
    found[roles[0]] |= strange
    return found
