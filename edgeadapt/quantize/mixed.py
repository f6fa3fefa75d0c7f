"""Which linear layers are worth 8 bits where the others get 4: those whose rounding costs most for each byte saved.

Layers that read the same input (query, key and value; gate and up) share their bits, so that they can be one product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeadapt.export.graph import Graph
from edgeadapt.progress import SILENT, Progress
from edgeadapt.quantize.blocks import stored_bytes
from edgeadapt.quantize.plan import Choice, choose_schemes
from edgeadapt.quantize.retie import retie
from edgeadapt.quantize.rounded import RoundedWeights
from edgeadapt.quantize.scheme import Moments, Settings, moment_of
from edgeadapt.quantize.schemes import int4
from edgeadapt.quantize.weights import Weight, find_weights

Importance = Mapping[str, NDArray[np.float32]]
FITTED = 0.3
"""Share of a flat spectrum mixed into the moments when losses are estimated: the rounding was fitted to the moments
and looks better on them than on new texts, most of all in wide layers. With 0.3 the estimates for down_proj, gate and
up, v_proj, q and k, o_proj are 1.0, 1.1, 0.8, 2.8 and 1.4 times what was measured; without, 0.2 to 0.7 times."""


@dataclass(frozen=True)
class Group:
    """Layers that share their bits.

    paths: module paths
    loss: estimated KL divergence (nats) that their 4-bit rounding costs
    extra_bytes: what 8 bits take more than 4
    """

    paths: tuple[str, ...]
    loss: float
    extra_bytes: int


@dataclass(frozen=True)
class Mix:
    """The groups in the order in which they are worth 8 bits.

    least_bytes: the weights' bytes with every group in 4 bits
    """

    groups: tuple[Group, ...]
    least_bytes: int

    def raised(self, count: int) -> frozenset[str]:
        """Return the module paths in 8 bits if the first `count` groups are."""
        return frozenset(path for group in self.groups[:count] for path in group.paths)

    def bytes(self, count: int) -> int:
        """Return the weights' bytes if the first `count` groups are in 8 bits."""
        return self.least_bytes + sum(group.extra_bytes for group in self.groups[:count])

    def loss(self, count: int) -> float:
        """Return the estimated KL divergence of the groups that stay in 4 bits."""
        return sum(group.loss for group in self.groups[count:])


def rank_groups(
    graph: Graph,
    importance: Importance,
    *,
    keep: Mapping[str, str] | None = None,
    moments: Moments | None = None,
    block_size: int | None = None,
    rounded: RoundedWeights | None = None,
    progress: Progress = SILENT,
) -> Mix:
    """Return the groups of linear layers that int4 would put in 4 bits, by falling loss for each byte of 8 bits.

    Args:
        graph: as for `quantize`; left as it is.
        importance: float32[out] by module path, from `collect_importance`.
        keep: exceptions, as for `quantize`; they are no group's.
        moments: as for `quantize`.
        block_size: as for `quantize`.
        rounded: as for `quantize`.
        progress: told of each group.

    Raises:
        QuantizeError: as `quantize` does.
    """
    size = int4.BLOCK_SIZE if block_size is None else block_size
    models = {role: model.clone() for role, model in graph.models.items()}
    for model in models.values():
        retie(model)
    choices = choose_schemes({role: find_weights(model) for role, model in models.items()}, "int4", keep or {})
    groups = _grouped([choice for choice in choices if choice.scheme == "int4" and not choice.reason])
    memory: dict[str, object] = {}
    found = []
    with progress.stage("rank layers"):
        for done, members in enumerate(groups, start=1):
            settings = [Settings(size, moment_of([weight], moments or {}), memory, rounded) for weight in members]
            found.append(
                Group(
                    paths=tuple(weight.path for weight in members),
                    loss=sum(_loss(w, s, importance.get(w.path)) for w, s in zip(members, settings, strict=True)),
                    extra_bytes=sum(_bytes(w, "int8", size) - _bytes(w, "int4", size) for w in members),
                )
            )
            progress.advance(done, len(groups))
    order = sorted(range(len(found)), key=lambda index: (-found[index].loss / found[index].extra_bytes, index))
    return Mix(tuple(found[index] for index in order), _total(choices, size))


def _grouped(choices: Sequence[Choice]) -> list[list[Weight]]:
    """Return weights by the value that they multiply, each constant once."""
    groups: dict[tuple[str, int], list[Weight]] = {}
    seen: set[int] = set()
    for choice in choices:
        weight = choice.weight
        if id(weight.initializer) not in seen:
            seen.add(id(weight.initializer))
            groups.setdefault((choice.role, id(weight.node.inputs[0])), []).append(weight)
    return list(groups.values())


def _loss(weight: Weight, settings: Settings, importance: NDArray[np.float32] | None) -> float:
    """Return 1/2 sum_i importance_i (E H E^T)_ii of the rounding error E float32[out, in]."""
    matrix = weight.matrix()
    error = matrix - int4.rounded(weight, matrix, settings).dequantize()
    squares = np.square(error).sum(1) / matrix.shape[1]  # inputs of length 1 in no direction more than in others
    if settings.moment is not None:
        squares = FITTED * squares + np.einsum("oi,oi->o", error @ settings.moment(), error)
    weights = np.ones(len(matrix), np.float32) if importance is None else importance
    return float(0.5 * np.sum(weights.astype(np.float64) * squares))


def _total(choices: Sequence[Choice], block_size: int) -> int:
    """Return the bytes of every constant once for each scheme that its uses have."""
    once = {
        (choice.role, id(choice.weight.initializer), choice.scheme, choice.weight.transposed): choice
        for choice in choices
    }
    return sum(_bytes(choice.weight, choice.scheme, block_size) for choice in once.values())


def _bytes(weight: Weight, scheme: str, block_size: int) -> int:
    shape = weight.shape[::-1] if weight.transposed else weight.shape
    if scheme in ("int4", "int8") and weight.kind != "conv":
        return stored_bytes(shape, int(scheme[3:]), block_size, symmetric=scheme == "int8")
    per_weight = {"int8": 1, "fp16": 2, "none": 4}[scheme]
    return per_weight * weight.elements + (4 * shape[0] if scheme == "int8" else 0)
