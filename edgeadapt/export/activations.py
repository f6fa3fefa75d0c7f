"""What linear modules see on the user's samples: the second moments that error-aware rounding needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgeadapt.export.gradients import Cases, layers_at, run_both_ways
from edgeadapt.merging.base_model import BaseModel

LARGEST_INPUT = 8192
SHORTEST = 1e-6
BYTES_AT_ONCE = 512 * 2**20
"""Moments held at a time. A larger model runs over the samples again for its later layers: time instead of memory."""


class Moments(Mapping[str, NDArray[np.float32]]):
    """E[w x xT] float32[in, in] of the input of every linear module, by module path; see `collect_moments`.

    Collected when they are asked for, some layers at a time, so ask in the order of the model.
    """

    def __init__(self, runs: Sequence[_Run], widths: Mapping[str, int], bytes_at_once: int) -> None:
        """Collect nothing yet."""
        self._runs = runs
        self._parts = _parts(widths, bytes_at_once)
        self._part_of = {path: number for number, part in enumerate(self._parts) for path in part}
        self._held: tuple[int, dict[str, NDArray[np.float32]]] = (-1, {})

    def __getitem__(self, path: str) -> NDArray[np.float32]:
        part = self._part_of[path]
        if part != self._held[0]:
            self._held = (-1, {})
            self._held = (part, _collect(self._runs, self._parts[part]))
        return self._held[1][path]

    def __contains__(self, path: object) -> bool:
        return path in self._part_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._part_of)

    def __len__(self) -> int:
        return len(self._part_of)


@dataclass(frozen=True)
class _Run:
    """One model, the cases that it runs on, and those of its modules that multiply by the base's weights, by path."""

    module: torch.nn.Module
    cases: Cases
    layers: Mapping[str, torch.nn.Module]


def collect_moments(
    base: BaseModel,
    cases: Cases,
    *,
    adapted: Sequence[tuple[torch.nn.Module, Cases]] = (),
    bytes_at_once: int = BYTES_AT_ONCE,
) -> Moments:
    """Return the second moments of the linear modules' inputs, of the base and of the base with its adapters.

    What an adapter does to its layers' inputs belongs to what the weights must be right for; the base and every
    adapter count the same, however long their samples are.

    How much an input x counts is w = 1/|x|^2 + c |g|^2, where g is the gradient at the module's output and c makes both
    parts of a text equal. A few tokens of a language model have inputs 50 times as long as the others and would decide
    everything without the first part; the second tells what matters to the answers (docs/decisions/0007-int4.md).

    Args:
        base: run without adapters.
        cases: keyword arguments of the forward; may be empty if `adapted` is not.
        adapted: modules with an adapter inside over the same weights, each with the cases that it runs on.
        bytes_at_once: see `BYTES_AT_ONCE`.
    """
    widths = {
        path: module.in_features
        for path, module in base.modules.items()
        if module.type in ("linear", "conv1d") and module.in_features <= LARGEST_INPUT
    }
    models = [(module, own) for module, own in ((base.module, cases), *adapted) if own]
    runs = [_Run(module, own, layers_at(module, tuple(widths))) for module, own in models]
    return Moments(runs, widths, bytes_at_once)


def _parts(widths: Mapping[str, int], bytes_at_once: int) -> list[list[str]]:
    """Return the paths in runs whose moments fit `bytes_at_once`, at least one each."""
    parts: list[list[str]] = []
    room = 0
    for path, width in widths.items():
        size = 4 * width**2
        if not parts or size > room:
            parts.append([])
            room = bytes_at_once
        parts[-1].append(path)
        room -= size
    return parts


def _collect(runs: Sequence[_Run], paths: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Return the mean over the runs of each one's mean over its inputs."""
    totals: dict[str, torch.Tensor] = {}
    shares: dict[str, int] = {}
    for run in runs:
        sums: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}

        def seen(
            path: str,
            x: torch.Tensor,
            gradient: torch.Tensor | None,
            sums: dict[str, torch.Tensor] = sums,
            counts: dict[str, int] = counts,
        ) -> None:
            flat = x.reshape(-1, x.shape[-1])
            scaled = flat * _weights(flat, gradient).sqrt()
            product = scaled.T @ scaled
            sums[path] = product if path not in sums else sums[path].add_(product)
            counts[path] = counts.get(path, 0) + len(flat)

        run_both_ways(run.module, run.cases, {path: run.layers[path] for path in paths}, seen)
        for path, total in sums.items():
            mean = total.div_(counts[path])
            totals[path] = mean if path not in totals else totals[path].add_(mean)
            shares[path] = shares.get(path, 0) + 1
    return {path: total.div_(shares[path]).numpy() for path, total in totals.items()}


def _weights(x: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Return how much each input of x float32[positions, in] counts, float32[positions, 1]."""
    squares = x.square().sum(1, keepdim=True).clamp_min(SHORTEST**2)
    weights = 1 / squares
    if gradient is not None:
        matters = gradient.reshape(len(x), -1).square().sum(1, keepdim=True)
        all_of_them = (matters * squares).sum()
        if all_of_them > 0:
            weights = weights + matters * (len(x) / all_of_them)
    return weights
