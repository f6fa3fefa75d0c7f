"""Graphs to files: a plain graph and a slots graph per role, over one data file.

The plain graph is the bare base; the slots graph takes the bundle's adapters. Equal bytes are stored once, whatever
their name or shape: both graphs share all weights, and a tied head shares them with its embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from edgeadapt.adapters.adapter import ResolvedAdapter, TargetModule
from edgeadapt.errors import ExportError
from edgeadapt.export.graph import Graph
from edgeadapt.quantize.branches import branch_outputs, branch_shapes, check_roles
from edgeadapt.quantize.join import join_products, joined_name
from edgeadapt.quantize.kv_cache import is_scale, scale_name
from edgeadapt.quantize.lower import Lowered, lower
from edgeadapt.slots import (
    BottleneckKind,
    BottleneckSlot,
    BranchKind,
    BranchSlot,
    GraphRecord,
    Joined,
    ParameterSlot,
    Slot,
    branch_kind,
)

WEIGHTS = "weights.bin"
EXTERNAL_FROM_BYTES = 1024
ALIGNMENT = 64


@dataclass(frozen=True)
class Packed:
    """What was written, for the manifest."""

    graphs: Mapping[str, GraphRecord]
    slots: tuple[Slot, ...]
    parameters: tuple[ParameterSlot, ...]
    joined: tuple[Joined, ...]
    branches: tuple[BranchSlot, ...]
    bottlenecks: tuple[BottleneckSlot, ...]
    cache_scales: int | None = None
    """Where the scales of a cache in int8 begin in the data file: float32[layers, 2, heads, 1, dim]."""


def pack(
    graph: Graph,
    folder: Path,
    adapters: Sequence[ResolvedAdapter],
    modules: Mapping[str, TargetModule],
    *,
    flexible: Iterable[str] = (),
    apart: Iterable[str] = (),
) -> Packed:
    """Write `graph` under `folder`/graph for the given adapters and return the slot table.

    Args:
        graph: with markers in place; consumed (its models are lowered in place).
        folder: the bundle's (staged) folder.
        adapters: those of the bundle; none for a merged bundle, which then gets no slots graph.
        modules: the base's modules.
        flexible: replaced parameters whose axis 0 may differ between adapters (class counts).
        apart: modules whose product stays one of its own, as it does where an adapter scales a module's input.

    Raises:
        ExportError: if a site or parameter of an adapter is in no graph.
    """
    wanted = _wanted(adapters)
    beside, further = _beside(adapters), _further(adapters)
    replaced = {name for adapter in adapters for name in adapter.replaced}
    flexible = set(flexible)
    apart = {*apart, *(site for site, terms in wanted.items() if "input_gain" in terms)}
    target = folder / "graph"
    target.mkdir(parents=True, exist_ok=True)
    files: dict[str, GraphRecord] = {}
    lowered: dict[str, Lowered] = {}
    with (target / WEIGHTS).open("wb") as stream:
        store = _Store(stream)
        cache_scales = _put_cache_scales(graph, store)
        for role, model in graph.models.items():
            inputs = tuple(str(value.name) for value in model.graph.inputs)
            outputs = tuple(str(value.name) for value in model.graph.outputs)
            join_products(model, apart)
            slots_model = model.clone() if adapters else None
            lower(model, {}, set(), set(), modules)
            _save(model, target / f"{role}.plain.onnx", store)
            slots_name = None
            if slots_model is not None:
                lowered[role] = found = lower(
                    *(slots_model, wanted, replaced, flexible, modules), bottlenecks=beside, branches=further
                )
                check_roles(found.branches, role)
                if found.terms or found.parameters or found.bottlenecks or found.branches:
                    slots_name = f"graph/{role}.slots.onnx"
                    _save(slots_model, target / f"{role}.slots.onnx", store)
            files[role] = GraphRecord(f"graph/{role}.plain.onnx", slots_name, inputs, outputs)
    terms = {site: used for found in lowered.values() for site, used in found.terms.items()}
    parameters = {name for found in lowered.values() for name in found.parameters}
    found_beside = {site for found in lowered.values() for site in found.bottlenecks}
    found_further = {site for found in lowered.values() for site in found.branches}
    missing = (set(wanted) - set(terms)) | (set(beside) - found_beside) | (set(further) - found_further)
    _all_found(missing, replaced - parameters)
    return Packed(
        graphs=files,
        slots=tuple(
            _slot([role for role in lowered if site in lowered[role].terms], used, modules[site])
            for site, used in sorted(terms.items())
        ),
        parameters=tuple(
            ParameterSlot(
                name,
                tuple(role for role in lowered if name in lowered[role].parameters),
                name,
                _parameter_shape(name, adapters, name in flexible),
            )
            for name in sorted(parameters)
        ),
        joined=tuple(
            Joined(role, sites, _inputs(joined_name(sites), found.terms[sites[0]]))
            for role, found in lowered.items()
            for sites in found.joined
        ),
        branches=tuple(
            _branch([role for role in lowered if site in lowered[role].branches], kind, modules[site])
            for site in sorted(found_further)
            for kind in sorted(further[site])
        ),
        bottlenecks=tuple(
            _bottleneck([role for role in lowered if site in lowered[role].bottlenecks], kind, modules[site])
            for site in sorted(found_beside)
            for kind in sorted(beside[site])
        ),
        cache_scales=cache_scales,
    )


def _put_cache_scales(graph: Graph, store: _Store) -> int | None:
    """Write the scales of a cache in int8 in one piece, so that sessions find them too; return where it begins."""
    spec = graph.generation
    if spec is None or spec.cache_dtype == "float32":
        return None
    constants = [graph.models["decoder"].graph.initializers[scale_name(name)] for name in spec.cache_names]
    return store.put_together([value.const_value.tobytes() for value in constants if value.const_value is not None])


def _wanted(adapters: Sequence[ResolvedAdapter]) -> dict[str, frozenset[str]]:
    """Return the terms that any adapter uses, per site (names of `SiteUpdate`)."""
    terms: dict[str, set[str]] = {}
    for adapter in adapters:
        for site, update in adapter.sites.items():
            terms.setdefault(site, set()).update(update.terms)
    return {site: frozenset(used) for site, used in terms.items() if used}


def _beside(adapters: Sequence[ResolvedAdapter]) -> dict[str, frozenset[BottleneckKind]]:
    """Return the kinds of bottleneck that any adapter has, per site."""
    kinds: dict[str, set[BottleneckKind]] = {}
    for adapter in adapters:
        for bottleneck in adapter.bottlenecks:
            kinds.setdefault(bottleneck.site, set()).add(bottleneck.slot_kind)
    return {site: frozenset(found) for site, found in kinds.items()}


def _bottleneck(roles: list[str], kind: BottleneckKind, module: TargetModule) -> BottleneckSlot:
    inputs = {term: f"{kind.prefix(module.path)}.{term}" for term in kind.terms}
    reads, activation, normalized, stage, fused = kind
    size = module.out_features
    return BottleneckSlot(module.path, tuple(roles), reads, activation, normalized, size, inputs, stage, fused)


def _further(adapters: Sequence[ResolvedAdapter]) -> dict[str, frozenset[BranchKind]]:
    """Return the kinds of branch that any adapter has, per site."""
    kinds: dict[str, set[BranchKind]] = {}
    for adapter in adapters:
        for branch in adapter.branches:
            kinds.setdefault(branch.site, set()).add(branch_kind(branch.form, branch.settings))
    return {site: frozenset(found) for site, found in kinds.items()}


def _branch(roles: list[str], kind: BranchKind, module: TargetModule) -> BranchSlot:
    shapes = branch_shapes(kind, module)
    inputs = {term: f"{kind.prefix(module.path)}.{term}" for term in shapes}
    return BranchSlot(
        module.path, tuple(roles), kind.form, dict(kind.settings), inputs, shapes, branch_outputs(kind, module.path)
    )


def _all_found(sites: set[str], parameters: set[str]) -> None:
    missing = sorted(sites | parameters)
    if missing:
        raise ExportError(
            f"the exported graph does not use {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}, "
            "which an adapter changes",
            hint="choose the --task whose model uses these modules (a pooler is unused in token classification)",
        )


def _slot(roles: list[str], terms: frozenset[str], module: TargetModule) -> Slot:
    inputs = _inputs(module.path, terms)
    return Slot(module.path, tuple(roles), module.type, module.in_features, module.out_features, inputs)


def _inputs(path: str, terms: frozenset[str]) -> dict[str, str]:
    names = {"a": "lora_A", "b": "lora_B", "gain": "gain", "offset": "offset", "input_gain": "input_gain"}
    return {term: f"{path}.{name}" for term, name in names.items() if term in terms}


def _parameter_shape(name: str, adapters: Sequence[ResolvedAdapter], flexible: bool) -> tuple[int | str, ...]:
    shape = next(adapter.replaced[name].shape for adapter in adapters if name in adapter.replaced)
    return ("num_labels", *shape[1:]) if flexible else tuple(shape)


class _Store:
    """One data file that holds equal bytes once."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.offsets: dict[tuple[bytes, int], int] = {}

    def put(self, data: bytes | memoryview) -> tuple[int, int]:
        """Write `data` if new; return its offset and length in bytes."""
        key = (hashlib.sha256(data).digest(), len(data))
        if key not in self.offsets:
            offset = self.stream.tell()
            padding = -offset % ALIGNMENT
            self.stream.write(b"\0" * padding)
            self.offsets[key] = offset + padding
            self.stream.write(data)
        return self.offsets[key], len(data)

    def put_together(self, parts: Sequence[bytes]) -> int:
        """Write `parts` one after the other, before anything else; return where the first begins.

        Each is known from then on, and lies in the file however small it is.
        """
        start, _ = self.put(b"".join(parts))
        for index, part in enumerate(parts):
            self.offsets.setdefault((hashlib.sha256(part).digest(), len(part)), start + sum(map(len, parts[:index])))
        return start


def _save(model: ir.Model, path: Path, store: _Store) -> None:
    """Write `model` to `path` with its large initializers in the store's file."""
    proto_values: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            raise ExportError(f"initializer {value.name} has no value", hint="this is a bug; please report it")
        if tensor.nbytes < EXTERNAL_FROM_BYTES and not is_scale(str(value.name)):
            continue
        offset, length = store.put(tensor.tobytes())
        external = ir.ExternalTensor(
            WEIGHTS,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
            base_dir=path.parent,
        )
        proto_values.append((value, tensor))
        value.const_value = external
    model.graph.name = path.name.split(".")[0]
    model.producer_name, model.producer_version = "edgeadapt", None
    ir.save(model, path)
    for value, tensor in proto_values:
        value.const_value = tensor
