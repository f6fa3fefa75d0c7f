"""Where adapters can act in a bundle's graphs: what packing writes, what the manifest holds, what binding reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

ROWWISE_TYPES = ("linear", "conv1d", "norm")
"""Modules whose slot computes by plain products and sums, which broadcast: each row of a batch may bring its own
adapter where its values are [batch, seq, out]. There the inputs declare no shape, because a first axis may come before
the usual ones."""

INPUT_GAIN_TYPES = ("linear", "conv1d")
"""Modules whose inputs an adapter can scale."""


@dataclass(frozen=True)
class Slot:
    """One module of the base at which adapters can act.

    site: module path in the base; graphs: roles of the graphs that hold it
    type: linear | conv1d | conv2d | embedding (| norm, other: gain and offset only)
    inputs: input per term ("a", "b", "gain", "offset", "input_gain"); a term that is absent has no input. It is the
        graph's input, except for a module of a joined product
    """

    site: str
    graphs: tuple[str, ...]
    type: str
    in_features: int
    out_features: int
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Joined:
    """Modules of one graph whose products are computed as one, with one branch for their adapters.

    graph: the graph's role; sites: the modules, in the order of their outputs; all have slots with the same terms
    inputs: graph input per term, for all of the modules together: A float32[in, sum of ranks] holds their A side by
        side, B float32[sum of ranks, sum of outs] theirs as blocks on the diagonal, gain and offset one after the other
    """

    graph: str
    sites: tuple[str, ...]
    inputs: Mapping[str, str]


class BottleneckKind(NamedTuple):
    """What makes two bottlenecks the same nodes of a graph; see `edgeadapt.adapters.adapter.Bottleneck`."""

    reads: str
    activation: str
    normalized: bool
    stage: int = 0
    fused: bool = False

    def prefix(self, site: str) -> str:
        """Return what the names of its inputs at a module begin with."""
        parts = [site, "bottleneck", self.reads, self.activation]
        parts += ["normalized"] if self.normalized else []
        parts += [f"stage{self.stage}"] if self.stage else []
        return ".".join([*parts, "fused"] if self.fused else parts)

    @property
    def terms(self) -> tuple[str, ...]:
        """Its inputs."""
        return FUSION_TERMS if self.fused else BOTTLENECK_TERMS


@dataclass(frozen=True)
class BottleneckSlot:
    """A place for a bottleneck beside one module of the base.

    site: the module to whose output it is added; graphs: roles of the graphs that hold it
    reads, activation, normalized: what the graph computes, which is not the adapter's to choose
    features: the length of the last axis of what it reads and gives
    inputs: graph input per term: "down", "down_bias", "up", "up_bias"; with "key" and "key_bias" if `fused`
    stage: which bottlenecks see it: those of a later stage read the output with this one's change
    fused: several bottlenecks, weighted by an attention over them (AdapterFusion)
    """

    site: str
    graphs: tuple[str, ...]
    reads: str
    activation: str
    normalized: bool
    features: int
    inputs: Mapping[str, str]
    stage: int = 0
    fused: bool = False

    @property
    def kind(self) -> BottleneckKind:
        """What makes two at one site different."""
        return BottleneckKind(self.reads, self.activation, self.normalized, self.stage, self.fused)


BOTTLENECK_TERMS = ("down", "down_bias", "up", "up_bias")
FUSION_TERMS = (*BOTTLENECK_TERMS, "key", "key_bias")
BOTTLENECK_READS = ("output", "residual", "sum", "norm")
BOTTLENECK_ACTIVATIONS = (
    *("relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "leaky_relu", "quick_gelu", "linear"),
)


class BranchKind(NamedTuple):
    """What makes two branches the same nodes of a graph; see `edgeadapt.adapters.adapter.Branch`."""

    form: str
    settings: tuple[tuple[str, str | int], ...]

    def prefix(self, site: str) -> str:
        """Return what the names of its inputs at a module begin with."""
        return ".".join((site, self.form, *(f"{name}-{value}" for name, value in self.settings)))


@dataclass(frozen=True)
class BranchSlot:
    """A place for a branch beside one module of the base.

    site: the module to whose output it is added; graphs: roles of the graphs that hold it
    form, settings: what the graph computes, which is not the adapter's to choose
    inputs: graph input per term; shapes: theirs, with names for axes whose lengths are the adapter's to choose
    outputs: outputs of the slots graph that are no answer of the model's, by what they are
    """

    site: str
    graphs: tuple[str, ...]
    form: str
    settings: Mapping[str, str | int]
    inputs: Mapping[str, str]
    shapes: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> BranchKind:
        """What makes two at one site different."""
        return branch_kind(self.form, self.settings)


def branch_kind(form: str, settings: Mapping[str, str | int]) -> BranchKind:
    """Return the kind of a branch of this form and these settings."""
    return BranchKind(form, tuple(sorted(settings.items())))


@dataclass(frozen=True)
class ParameterSlot:
    """One parameter of the base that adapters may replace whole.

    input: the graph input's name; shape: torch's layout, a string for an axis that may vary ("num_labels")
    """

    parameter: str
    graphs: tuple[str, ...]
    input: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphRecord:
    """One graph's files (slots is None for a merged bundle) and its data inputs and outputs."""

    plain: str
    slots: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
