"""How much each output of the linear modules matters to what the model answers: one pass forth and back per case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeadapt.export.activations import Cases, layers_at
from edgeadapt.merging.base_model import BaseModel

LOGITS = "logits"
SEED = 0


def collect_importance(
    base: BaseModel, cases: Cases, *, adapted: Sequence[tuple[torch.nn.Module, Cases]] = ()
) -> dict[str, NDArray[np.float32]]:
    """Return E[g^2 |x|^2] float32[out] of every linear module, by path: g the gradient at its output, x its input.

    A weight error E in a layer whose inputs of length 1 have the second moment H then moves the model's distribution
    by a KL divergence of about 1/2 sum_i importance_i (E H E^T)_ii. For that the loss is minus the log-probability of
    an answer drawn from the model's own distribution (the Fisher information); models without logits have their
    outputs summed with random signs, which ranks layers all the same. Both are drawn from a fixed seed.

    Args:
        base: run without adapters.
        cases: keyword arguments of the forward; may be empty if `adapted` is not.
        adapted: modules with an adapter inside over the same weights, each with the cases that it runs on.
    """
    sums: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(SEED)
    positions = 0

    def hook(path: str) -> Any:
        def keep(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            if y.shape[-1] != base.modules[path].out_features:
                return  # a head that the adapter replaces: it is never rounded
            lengths = args[0].detach().square().sum(-1, keepdim=True)

            def add(gradient: torch.Tensor) -> None:
                found = (gradient.square() * lengths).reshape(-1, gradient.shape[-1]).sum(0)
                sums[path] = found if path not in sums else sums[path].add_(found)

            if not y.requires_grad:
                y.requires_grad_()
            y.register_hook(add)  # type: ignore[no-untyped-call]

        return keep

    paths = tuple(path for path, module in base.modules.items() if module.type in ("linear", "conv1d"))
    for module, own in ((base.module, cases), *adapted):
        handles = [layer.register_forward_hook(hook(path)) for path, layer in layers_at(module, paths).items()]
        try:
            positions += _differentiate(module, own, generator)
        finally:
            for handle in handles:
                handle.remove()
    return {path: (total / max(positions, 1)).numpy() for path, total in sums.items()}


def _differentiate(module: torch.nn.Module, cases: Cases, generator: torch.Generator) -> int:
    """Run `cases` forth and back, and return of how many answers."""
    positions = 0
    with _frozen(module):
        for case in cases:
            loss, count = _loss(module(**case), generator)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            positions += count
    return positions


def _loss(output: Any, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Return the loss to differentiate, and over how many answers it is summed."""
    logits = output.get(LOGITS) if isinstance(output, Mapping) else getattr(output, LOGITS, None)
    if logits is not None and logits.ndim > 1 and logits.shape[-1] > 1:
        flat = logits.reshape(-1, logits.shape[-1])
        drawn = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)[:, 0]
        return torch.nn.functional.cross_entropy(flat, drawn, reduction="sum"), len(flat)
    tensors = [output] if isinstance(output, torch.Tensor) else list(getattr(output, "values", lambda: output)())
    floats = [x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad]
    signs = [torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1 for x in floats]
    loss = torch.stack([(x * sign).sum() for x, sign in zip(floats, signs, strict=True)]).sum()
    return loss, max(x[..., 0].numel() for x in floats)


@contextmanager
def _frozen(module: torch.nn.Module) -> Iterator[None]:
    """Have no gradients of weights, and parameters as they were afterwards."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
