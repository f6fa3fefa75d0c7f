"""The bundle's manifest, format 1: rules without files. docs/formats/bundle-1.md is the normative text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeadapt.slots import BottleneckSlot, BranchSlot, GraphRecord, Joined, ParameterSlot, Slot

SCHEMA = "edgeadapt.bundle/1"


@dataclass(frozen=True)
class BaseModule:
    """A base module that adapters can name, with the SHA-256 of its float32 weight (see `TargetModule`)."""

    path: str
    type: str
    class_name: str
    weight_shape: tuple[int, ...]
    in_features: int
    out_features: int
    has_bias: bool
    digest: str
    groups: int = 1


@dataclass(frozen=True)
class BaseRecord:
    """Which base the graphs were made from. `fingerprint` is the SHA-256 over all modules' paths and digests."""

    name: str
    revision: str | None
    model_type: str
    quantized_from: str | None
    fingerprint: str
    modules: tuple[BaseModule, ...]


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes, SHA-256 and role (graph | weights | asset | adapter | golden) of one file."""

    size: int
    sha256: str
    role: str


@dataclass(frozen=True)
class Pruning:
    """What was left out of an adapter when it was exported, and what that cost.

    max_kl: the budget in nats; kl: the mean KL divergence of the whole adapter's answers from these, unquantized
    ranks, sites, parameters: what is left, over all sites; with _before: what there was
    """

    max_kl: float
    kl: float
    ranks_before: int
    ranks: int
    sites_before: int
    sites: int
    parameters_before: int
    parameters: int


@dataclass(frozen=True)
class BlendPart:
    """One adapter that a blend was made of: name, weight, and the SHA-256 of its file then."""

    adapter: str
    weight: float
    sha256: str


@dataclass(frozen=True)
class Blend:
    """Of what and how an adapter was made in the bundle (see combine.py).

    density, rank, seed: as in `combine.Settings`
    error: of its products A B, as stored, against the exact weighted sum: relative, Frobenius norms over all modules
    rank_error: what its ranks lose of the method's own result, relative to that
    """

    parts: tuple[BlendPart, ...]
    method: str
    density: float | None
    rank: int | None
    seed: int | None
    error: float
    rank_error: float


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter in the bundle.

    minimum_effect: how far its golden outputs are from the base's, relative to the largest base output; verified
    base_checked: "stamp" (its own base fingerprint matched), "shapes" (only module names and shapes could be checked)
    labels: class names that go with its head, if any
    pruned: what was left out of it, or None
    prefix_tokens: how many virtual tokens every text begins with
    blend: what it was made of, or None
    """

    kind: str
    rank: int
    parameters: int
    minimum_effect: float
    tolerance: float
    base_checked: str
    labels: tuple[str, ...] = ()
    pruned: Pruning | None = None
    prefix_tokens: int = 0
    blend: Blend | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything a reader must know of a bundle. JSON of exactly these fields; unknown ones are refused.

    joined: slots whose modules share a branch in a graph
    bottlenecks, branches: where adapters can have small networks beside the base's modules
    merged: the adapter that was merged into the weights, or None
    quantization: the record that `quantize` returned; parity and quality: what was measured against torch (see
        edgeadapt.quality); generation: the fields of DecoderSpec, or None
    digest: SHA-256 of this manifest as canonical JSON with an empty digest: finds damage, proves no origin
    """

    schema: str
    name: str
    task: str
    base: BaseRecord
    graphs: Mapping[str, GraphRecord]
    slots: tuple[Slot, ...]
    parameters: tuple[ParameterSlot, ...]
    adapter_dtype: str
    merged: str | None
    adapters: Mapping[str, AdapterRecord]
    quantization: Mapping[str, Any]
    parity: Mapping[str, Any]
    quality: tuple[Mapping[str, Any], ...]
    files: Mapping[str, FileRecord]
    runtime: Mapping[str, Any]
    generation: Mapping[str, Any] | None = None
    labels: tuple[str, ...] = ()
    joined: tuple[Joined, ...] = ()
    bottlenecks: tuple[BottleneckSlot, ...] = ()
    branches: tuple[BranchSlot, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
