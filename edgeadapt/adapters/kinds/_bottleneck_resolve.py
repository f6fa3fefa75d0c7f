"""AdapterHub's bottlenecks at the modules of a base, proven complete."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, Bottleneck, ResolvedAdapter, TargetModule
from edgeadapt.adapters.fingerprint import base_label, check_digest, check_unrounded
from edgeadapt.adapters.hub_heads import resolve_head
from edgeadapt.adapters.hub_keys import head_tensors
from edgeadapt.adapters.kinds._bottleneck_config import activation_of, reads_of, width_of
from edgeadapt.adapters.kinds._bottleneck_rows import Row, row_of
from edgeadapt.adapters.kinds._bottleneck_tensors import Place, matrix, places_of
from edgeadapt.adapters.kinds._invertible import resolve_invertible
from edgeadapt.adapters.selection import Move, find_move, name_some
from edgeadapt.errors import AdapterError

_RIGHT_BASE = "give the base that the adapter was trained on, loaded for the same task"


def resolve_bottleneck(adapter: Adapter, modules: Mapping[str, TargetModule], base_name: str | None) -> ResolvedAdapter:
    """Return the adapter as arrays.

    Raises:
        AdapterError: a layer has no tensors, a tensor has no use, or the base does not fit.
    """
    beside, invertible = resolve_places(adapter, modules, base_name)
    replaced = resolve_head(adapter, head_tensors(adapter), modules, base_name)
    bottlenecks = (*beside.values(), *invertible)
    return ResolvedAdapter(adapter.name, adapter.kind, {}, replaced, bottlenecks=bottlenecks)


def resolve_places(
    adapter: Adapter, modules: Mapping[str, TargetModule], base_name: str | None
) -> tuple[dict[str, Bottleneck], tuple[Bottleneck, ...]]:
    """Return the adapter's bottlenecks by the place that keys name, and those of its invertible part.

    Raises:
        AdapterError: a layer has no tensors, a tensor has no use, or the base does not fit.
    """
    places = places_of(adapter)
    rows = {name: row_of(adapter, place, modules, base_name) for name, place in places.items()}
    paths = {name: f"{place.layer}.{rows[name].product}" for name, place in places.items()}
    move = find_move(paths.values(), modules)
    _check_complete(adapter, places, rows, move, modules, base_name=base_name)
    names = {move.to_base(path): path for path in paths.values()}
    for path, name in names.items():
        check_digest(adapter.base, (path, name), modules[path], base_name)
    check_unrounded(adapter.base, {path: move.to_adapter(path) or path for path in modules}, modules, base_name)
    found = {name: _bottleneck(adapter, place, rows[name], move, modules) for name, place in sorted(places.items())}
    return found, resolve_invertible(adapter, modules, move, base_name)


def _check_complete(
    adapter: Adapter,
    places: Mapping[str, Place],
    rows: Mapping[str, Row],
    move: Move,
    modules: Mapping[str, TargetModule],
    *,
    base_name: str | None,
) -> None:
    """Check that there is a bottleneck wherever the settings put one in the base, and nowhere else."""
    settings = adapter.config["config"]
    left_out = set(settings.get("leave_out") or ())
    found = {(rows[name].flag, _stack(place), place.index) for name, place in places.items()}
    family = {row.location: row for row in rows.values()}
    for row in family.values():
        if not settings.get(row.flag):
            raise AdapterError(f"there are tensors at {row.location!r}, but {row.flag} is false", hint=_RIGHT_BASE)
    missing = []
    for flag in ("mh_adapter", "output_adapter"):
        if not settings.get(flag):
            continue
        for stack, index in _layers(adapter, places, rows, move, modules):
            wanted = index not in left_out and width_of(adapter.config, index) is not None
            if wanted != ((flag, stack, index) in found):
                missing.append(f"{flag} in layer {index}")
    if missing:
        raise AdapterError(
            f"the adapter's tensors do not fit the layers of {base_label(base_name)}: {name_some(missing, str)} "
            "(missing, or there against leave_out)",
            hint="the adapter's files are incomplete or damaged, or " + _RIGHT_BASE,
        )


def _stack(place: Place) -> str:
    return place.layer.removesuffix(str(place.index))


def _layers(
    adapter: Adapter,
    places: Mapping[str, Place],
    rows: Mapping[str, Row],
    move: Move,
    modules: Mapping[str, TargetModule],
) -> list[tuple[str, int]]:
    """Return the base's layers: the stack that each is in, as the adapter names it, and its number there."""
    products = {rows[name].product for name in places}
    layers: dict[tuple[str, int], re.Match[str]] = {}
    for product in products:
        pattern = re.compile(rf"(?P<stack>.+\.)(?P<index>\d+)\.{re.escape(product)}")
        layers |= {(m["stack"], int(m["index"])): m for path in modules if (m := pattern.fullmatch(path)) is not None}
    stacks = {move.to_base(_stack(place)): _stack(place) for place in places.values()}
    if "interface" in adapter.config or len(stacks) == 1:
        # behind a plugin interface, or where another part of the base is built of the same modules
        return sorted((stacks[stack], index) for stack, index in layers if stack in stacks)
    settings = adapter.config["config"]
    if settings.get("leave_out") or isinstance(settings.get("reduction_factor"), Mapping):
        raise AdapterError(
            f"leave_out and a table of reduction_factor count layers, and the adapter is in several stacks of them "
            f"({name_some(set(stacks.values()))})",
            hint="train it in all layers with one reduction_factor",
        )
    return sorted((stacks.get(stack, stack), index) for stack, index in layers)


def _bottleneck(
    adapter: Adapter, place: Place, row: Row, move: Move, modules: Mapping[str, TargetModule]
) -> Bottleneck:
    settings = adapter.config["config"]
    reads, behind_norm = reads_of(settings, normed=row.norm is not None)
    reads = row.check_reads(reads)
    site = move.to_base(f"{place.layer}.{row.product}")
    if behind_norm:
        site = f"{site.removesuffix(row.product)}{row.norm}"
    down, down_bias = _down(place, settings)
    up, up_bias = matrix(place, "up", "adapter_up", settings)
    scale = _scale(place, settings)
    up, up_bias = up * scale, (np.zeros(up.shape[1], np.float32) if up_bias is None else up_bias) * scale
    _check_shapes(adapter, place, modules[site], down, up)
    down, down_bias, up, up_bias = (np.ascontiguousarray(x, np.float32) for x in (down, down_bias, up, up_bias))
    normalized = bool(settings.get("ln_before"))
    return Bottleneck(site, reads, activation_of(adapter.config), normalized, down, down_bias, up, up_bias)


def _down(place: Place, settings: Mapping[str, object]) -> tuple[Array, Array]:
    """Return the way down, a norm's gain and offset before it folded in."""
    normalized = bool(settings.get("ln_before"))
    down, bias = matrix(place, "down", "adapter_down.1" if normalized else "adapter_down.0", settings)
    bias = np.zeros(down.shape[1], np.float32) if bias is None else bias
    if normalized:
        gain, offset = (place.parts[f"adapter_norm_before.{part}"].read() for part in ("weight", "bias"))
        bias = bias + offset @ down
        down = gain[:, None] * down
    return down, bias


def _scale(place: Place, settings: Mapping[str, object]) -> Array:
    """Return float32[1] or float32[features]."""
    scaling = settings.get("scaling", 1.0)
    return place.parts["scaling"].read() if isinstance(scaling, str) else np.array([scaling], np.float32)


def _check_shapes(adapter: Adapter, place: Place, module: TargetModule, down: Array, up: Array) -> None:
    features = module.out_features
    width = width_of(adapter.config, place.index, features)
    if down.shape != (features, width) or up.shape != (width, features):
        raise AdapterError(
            f"the bottleneck at {place.layer}.{place.location} is {list(down.shape)} and {list(up.shape)}; the base's "
            f"module {module.path!r} and reduction_factor need [{features}, {width}] and [{width}, {features}]",
            hint="the adapter's files do not belong together, or " + _RIGHT_BASE,
        )
