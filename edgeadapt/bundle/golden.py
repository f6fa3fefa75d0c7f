"""A golden: one input of an adapter with the outputs it must give, with the adapter and without.

Both outputs, because the commonest failure of adapters is that they load and do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgeadapt.errors import BundleError
from edgeadapt.fields import from_mapping
from edgeadapt.files import canonical_json, parse_json, read_bytes

Array = NDArray[Any]

SCHEMA = "edgeadapt.golden/1"
_MAX_BYTES = 2**30
_GROUPS = ("inputs", "base", "adapted")


@dataclass(frozen=True)
class Golden:
    """What must come out.

    inputs: graph inputs by name; base, adapted: outputs by name without and with the adapter
    tolerance: the largest error allowed, relative to the largest expected value of the same output
    minimum_effect: how far adapted outputs must at least be from the base's, relative to the largest base value
    """

    inputs: Mapping[str, Array]
    base: Mapping[str, Array]
    adapted: Mapping[str, Array]
    tolerance: float
    minimum_effect: float


@dataclass(frozen=True)
class _Header:
    schema: str
    tolerance: float
    minimum_effect: float


def make_golden(
    name: str,
    inputs: Mapping[str, Array],
    base: Mapping[str, Array],
    adapted: Mapping[str, Array],
    *,
    idle: Mapping[str, Array] | None = None,
    tolerance: float,
    smallest_effect: float,
) -> Golden:
    """Return a golden that asks for at least half of the effect that was measured now.

    Args:
        name: the adapter's, for messages.
        inputs: graph inputs by name.
        base: outputs without the adapter.
        adapted: outputs with it.
        idle: outputs with all but the adapter's own change, where that is not the base: with its residual.
        tolerance: see `Golden`; what another machine may differ by.
        smallest_effect: an adapter whose effect is not above this does nothing.

    Raises:
        BundleError: if the adapter does nothing, or its outputs are not finite.
    """
    for array in [*base.values(), *adapted.values()]:
        if not np.isfinite(array).all():
            raise BundleError(
                f"adapter {name!r}: the golden outputs hold NaN or infinite values",
                hint="the adapter or the quantized base is broken; try --quantize none",
            )
    measured = min(effect(base, adapted), effect(base if idle is None else idle, adapted))
    if measured <= smallest_effect:
        raise BundleError(
            f"adapter {name!r} does nothing: its outputs differ from the base's by {measured:.3g} of the largest "
            f"value, at least {smallest_effect:.3g} is needed",
            hint="check that the adapter was trained and saved (an untrained LoRA has a zero B)",
        )
    return Golden(inputs, base, adapted, tolerance, measured / 2)


def effect(base: Mapping[str, Array], adapted: Mapping[str, Array]) -> float:
    """Return the largest relative difference of any output; 1 where the shapes differ (another head)."""
    if base.keys() != adapted.keys():
        raise ValueError(f"outputs {sorted(base)} and {sorted(adapted)} cannot be compared")
    return max(
        relative_error(base[name], adapted[name]) if base[name].shape == adapted[name].shape else 1.0 for name in base
    )


def relative_error(expected: Array, measured: Array) -> float:
    """Return max |measured - expected| / max |expected| (absolute where everything expected is 0)."""
    if expected.size == 0:
        return 0.0
    wanted = expected.astype(np.float64)
    scale = float(np.abs(wanted).max()) or 1.0
    return float(np.abs(measured.astype(np.float64) - wanted).max()) / scale


def check_golden(golden: Golden, base: Mapping[str, Array], adapted: Mapping[str, Array]) -> str | None:
    """Return what is wrong with measured outputs, or None if they are as the golden says."""
    return (
        _check_outputs("without the adapter", golden.base, base, golden.tolerance)
        or _check_outputs("with the adapter", golden.adapted, adapted, golden.tolerance)
        or _check_effect(golden, base, adapted)
    )


def dump_golden(golden: Golden) -> bytes:
    """Return a golden as safetensors bytes, the same bytes for the same golden."""
    groups = {"inputs": golden.inputs, "base": golden.base, "adapted": golden.adapted}
    tensors = {
        f"{group}:{name}": np.ascontiguousarray(value).reshape(value.shape)
        for group, arrays in groups.items()
        for name, value in arrays.items()
    }
    header = {"schema": SCHEMA, "tolerance": golden.tolerance, "minimum_effect": golden.minimum_effect}
    # One key: safetensors writes several in a random order.
    return save(tensors, metadata={"golden": canonical_json(header).decode()})


def read_golden(path: Path) -> Golden:
    """Return the golden in a file.

    Raises:
        BundleError: if it is damaged or not a golden.
        FileError: if it cannot be read.
    """
    return parse_golden(read_bytes(path, max_bytes=_MAX_BYTES), str(path))


def parse_golden(data: bytes, where: str) -> Golden:
    """Return the golden in `data`.

    Raises:
        BundleError: if it is damaged or not a golden, naming `where`.
    """
    try:
        tensors = load(data)
        header_bytes = int.from_bytes(data[:8], "little")
        metadata = parse_json(data[8 : 8 + header_bytes], where, BundleError).get("__metadata__", {})
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # KeyError, TypeError: a dtype numpy lacks
        raise BundleError(
            f"{where}: not a valid golden: {error}", hint="remove the adapter and add it again"
        ) from error
    if set(metadata) != {"golden"}:
        raise BundleError(f"{where}: not a golden: it has no golden header", hint="remove the adapter and add it again")
    header = from_mapping(_Header, parse_json(metadata["golden"].encode(), where, BundleError), where, BundleError)
    groups: dict[str, dict[str, Array]] = {group: {} for group in _GROUPS}
    for key, value in tensors.items():
        group, _, name = key.partition(":")
        if group not in groups or not name:
            raise BundleError(f"{where}: unknown tensor {key!r}", hint="remove the adapter and add it again")
        groups[group][name] = value
    _check_header(header, groups, where)
    return Golden(groups["inputs"], groups["base"], groups["adapted"], header.tolerance, header.minimum_effect)


def _check_header(header: _Header, groups: Mapping[str, Mapping[str, Array]], where: str) -> None:
    problem = None
    if header.schema != SCHEMA:
        problem = f"schema is {header.schema!r}, must be {SCHEMA!r}"
    elif header.tolerance <= 0 or header.minimum_effect <= 0:
        problem = f"tolerance {header.tolerance} and minimum_effect {header.minimum_effect} must be above 0"
    elif not groups["inputs"] or not groups["base"] or groups["base"].keys() != groups["adapted"].keys():
        problem = "inputs or outputs are missing"
    elif not all(np.isfinite(value).all() for arrays in groups.values() for value in arrays.values()):
        problem = "it holds NaN or infinite values"
    if problem is not None:
        raise BundleError(f"{where}: not a valid golden: {problem}", hint="remove the adapter and add it again")


def _check_outputs(
    when: str, expected: Mapping[str, Array], measured: Mapping[str, Array], tolerance: float
) -> str | None:
    for name, wanted in expected.items():
        if name not in measured:
            return f"{when} there is no output {name!r}"
        value = measured[name]
        if value.shape != wanted.shape:
            return f"{when} output {name!r} has the shape {list(value.shape)}, not {list(wanted.shape)}"
        if not np.isfinite(value).all():
            return f"{when} output {name!r} holds NaN or infinite values"
        error = relative_error(wanted, value)
        if error > tolerance:
            return f"{when} output {name!r} is off by {error:.3g} of its largest value, allowed are {tolerance:.3g}"
    return None


def _check_effect(golden: Golden, base: Mapping[str, Array], adapted: Mapping[str, Array]) -> str | None:
    names = golden.base.keys()
    measured = effect({name: base[name] for name in names}, {name: adapted[name] for name in names})
    if measured < golden.minimum_effect:
        return (
            f"the adapter has hardly any effect: outputs differ from the base's by {measured:.3g} of the largest "
            f"value, at least {golden.minimum_effect:.3g} are needed"
        )
    return None
