"""How much each output of the linear modules matters to what the model answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edgeadapt.export.gradients import Cases, layers_at, run_both_ways
from edgeadapt.merging.base_model import BaseModel


def collect_importance(
    base: BaseModel, cases: Cases, *, adapted: Sequence[tuple[torch.nn.Module, Cases]] = ()
) -> dict[str, NDArray[np.float32]]:
    """Return E[g^2 |x|^2] float32[out] of every linear module, by path: g the gradient at its output, x its input.

    A weight error E in a layer whose inputs of length 1 have the second moment H then moves the model's distribution
    by a KL divergence of about 1/2 sum_i importance_i (E H E^T)_ii; for models without logits the sum ranks layers
    all the same.

    Args:
        base: run without adapters.
        cases: keyword arguments of the forward; may be empty if `adapted` is not.
        adapted: modules with an adapter inside over the same weights, each with the cases that it runs on.
    """
    sums: dict[str, torch.Tensor] = {}

    def seen(path: str, x: torch.Tensor, gradient: torch.Tensor | None) -> None:
        if gradient is None or gradient.shape[-1] != base.modules[path].out_features:
            return  # nothing depends on it, or it is a head that the adapter replaces
        lengths = x.square().sum(-1, keepdim=True)
        found = (gradient.square() * lengths).reshape(-1, gradient.shape[-1]).sum(0)
        sums[path] = found if path not in sums else sums[path].add_(found)

    paths = tuple(path for path, module in base.modules.items() if module.type in ("linear", "conv1d"))
    models = ((base.module, cases), *adapted)
    answers = sum(run_both_ways(module, own, layers_at(module, paths), seen) for module, own in models)
    return {path: (total / max(answers, 1)).numpy() for path, total in sums.items()}
