"""What linear modules see on the user's samples: the second moments that error-aware rounding needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeadapt.merging.base_model import BaseModel

LARGEST_INPUT = 8192
SHORTEST = 1e-6
BYTES_AT_ONCE = 512 * 2**20
"""Moments held at a time. A larger model runs over the samples again for its later layers: time instead of memory."""

Cases = Sequence[Mapping[str, torch.Tensor]]


class Moments(Mapping[str, NDArray[np.float32]]):
    """E[x xT] float32[in, in] of the input of every linear module, by module path, each x scaled to length 1.

    Collected when they are asked for, some layers at a time, so ask in the order of the model. Modules with the same
    input share one array.
    """

    def __init__(self, runs: Sequence[_Run], widths: Mapping[str, int], bytes_at_once: int) -> None:
        """Run the first case of all, to see which modules share their input."""
        self._runs = runs
        self._owner = _owners(runs[0])
        self._parts = _parts(tuple(dict.fromkeys(self._owner.values())), widths, bytes_at_once)
        self._held: dict[str, NDArray[np.float32]] = {}

    def __getitem__(self, path: str) -> NDArray[np.float32]:
        owner = self._owner[path]
        if owner not in self._held:
            self._held.clear()
            self._held = _collect(self._runs, next(part for part in self._parts if owner in part))
        return self._held[owner]

    def __contains__(self, path: object) -> bool:
        return path in self._owner

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)


def collect_moments(
    base: BaseModel,
    cases: Cases,
    *,
    adapted: Sequence[tuple[torch.nn.Module, Cases]] = (),
    bytes_at_once: int = BYTES_AT_ONCE,
) -> Moments:
    """Return the second moments of the linear modules' inputs, of the base and of the base with its adapters.

    What an adapter does to its layers' inputs belongs to what the weights must be right for: on SmolLM2 with two
    adapters of rank 16 it brings their KL divergence at int4 from 0.35 and 0.27 to 0.05.

    A few tokens of a language model have inputs 50 times as long as the others and would decide everything, so every
    input counts with length 1: 0.14 instead of 0.20 (docs/decisions/0005-quantization.md).

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


@dataclass(frozen=True)
class _Run:
    """One model, the cases that it runs on, and those of its modules that multiply by the base's weights, by path."""

    module: torch.nn.Module
    cases: Cases
    layers: Mapping[str, torch.nn.Module]


def layers_at(module: torch.nn.Module, paths: Sequence[str]) -> dict[str, torch.nn.Module]:
    """Return the modules at `paths`, behind the prefix that an adapter's library puts before all of them."""
    named = dict(module.named_modules())
    ends = [name for name in named if paths and f".{name}".endswith(f".{paths[0]}")]
    prefixes = [name.removesuffix(paths[0]) for name in ends]
    prefix = next((start for start in prefixes if all(start + path in named for path in paths)), "")
    found = {path: named[prefix + path] for path in paths}
    return {path: _inner(layer) for path, layer in found.items()}


def _inner(layer: torch.nn.Module) -> torch.nn.Module:
    """Return the base's own layer inside an adapter's, which may change the input before it."""
    inner = getattr(layer, "base_layer", layer)
    return inner if isinstance(inner, torch.nn.Module) else layer


def _watch(run: _Run, cases: Cases, paths: Sequence[str], seen: Callable[[str, torch.Tensor], None]) -> None:
    """Run `cases` and call `seen` with every input of the modules at `paths`."""

    def hook(path: str) -> Any:
        return lambda _module, args: seen(path, args[0])

    handles = [run.layers[path].register_forward_pre_hook(hook(path)) for path in paths]
    try:
        with torch.no_grad():
            for case in cases:
                run.module(**case)
    finally:
        for handle in handles:
            handle.remove()


def _owners(run: _Run) -> dict[str, str]:
    """Return, in the order in which they run, each module's path and that of the first one with the same input."""
    owner: dict[str, str] = {}
    last: list[tuple[torch.Tensor, str]] = []

    def seen(path: str, x: torch.Tensor) -> None:
        if not (last and last[0][0] is x):
            last[:] = [(x, path)]
        owner.setdefault(path, last[0][1])

    _watch(run, run.cases[:1], tuple(run.layers), seen)
    return owner


def _parts(owners: Sequence[str], widths: Mapping[str, int], bytes_at_once: int) -> list[list[str]]:
    """Return the owners in runs whose moments fit `bytes_at_once`, at least one each."""
    parts: list[list[str]] = []
    room = 0
    for path in owners:
        size = 4 * widths[path] ** 2
        if not parts or size > room:
            parts.append([])
            room = bytes_at_once
        parts[-1].append(path)
        room -= size
    return parts


def _collect(runs: Sequence[_Run], paths: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def seen(path: str, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(SHORTEST)
        product = flat.T @ flat
        sums[path] = product if path not in sums else sums[path].add_(product)
        counts[path] = counts.get(path, 0) + flat.shape[0]

    for run in runs:
        _watch(run, run.cases, paths, seen)
    return {path: (total / counts[path]).numpy() for path, total in sums.items()}
