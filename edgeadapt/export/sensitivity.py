"""How much each rank of an adapter matters to the model's answers: moments and gradients inside its branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate
from edgeadapt.adapters.prune import Sensitivity
from edgeadapt.errors import ExportError
from edgeadapt.export.frozen import frozen
from edgeadapt.merging.base_model import BaseModel

LOGITS = "logits"
SEED = 0


def collect_sensitivity(
    base: BaseModel, adapter: ResolvedAdapter, cases: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, Sensitivity]:
    """Return a `Sensitivity` for every site of `adapter` with a low-rank term, from one pass forth and back per case.

    The loss is the one that is right on average: minus the log-probability of an answer drawn from the model's own
    distribution with a fixed seed, so that gradients give the Fisher information.

    Args:
        base: run with the adapter in place.
        adapter: the adapter.
        cases: keyword arguments of the forward.

    Raises:
        ExportError: if the model gives no logits.
    """
    branches = {path: _Branch(base, path, update) for path, update in adapter.sites.items()}
    replaced = {name: torch.from_numpy(value) for name, value in adapter.replaced.items()}
    generator = torch.Generator().manual_seed(SEED)
    answers = 0
    with ExitStack() as stack:
        stack.enter_context(frozen(base.module))
        for branch in branches.values():
            stack.callback(branch.module.register_forward_hook(branch.hook).remove)
        for case in cases:
            output = torch.func.functional_call(base.module, replaced, (), dict(case), tie_weights=False)
            logits = _logits(output, base)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            used = [(branch, branch.hidden) for branch in branches.values() if branch.hidden is not None]
            gradients = torch.autograd.grad(loss, [hidden for _, hidden in used], allow_unused=True)
            for (branch, hidden), gradient in zip(used, gradients, strict=True):
                branch.add(hidden.detach(), gradient)
            answers += len(logits)
    return {path: branch.result(answers) for path, branch in branches.items() if branch.rank}


class _Branch:
    """One site as `SiteUpdate` has it, with h = x A kept between the pass forth and the pass back."""

    def __init__(self, base: BaseModel, path: str, update: SiteUpdate) -> None:
        self.module = base.module.get_submodule(path)
        self.type = base.modules[path].type
        self.rank = update.rank
        self.a, self.b, self.gain, self.offset, self.input_gain = (
            None if value is None else torch.from_numpy(value)
            for value in (update.a, update.b, update.gain, update.offset, update.input_gain)
        )
        self.hidden: torch.Tensor | None = None
        self._count = 0
        self._moments = torch.zeros((self.rank, self.rank), dtype=torch.float64)
        self._gradients = torch.zeros((self.rank, self.rank), dtype=torch.float64)

    def hook(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        """Return the module's output with the adapter."""
        if self.input_gain is not None:
            y = self.module.forward(args[0] * self.input_gain)
        if self.a is not None:
            self.hidden = self._reduce(args[0]).requires_grad_()
            y = y + self._expand(self.hidden)
        channels = (-1, 1, 1) if self.type == "conv2d" else (-1,)
        if self.gain is not None:
            y = y * self.gain.reshape(channels)
        return y if self.offset is None else y + self.offset.reshape(channels)

    def add(self, hidden: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """Count one case: h from the pass forth, its gradient from the pass back."""
        h = self._rows(hidden)
        self._moments += h.T @ h
        self._count += len(h)
        if gradient is not None:
            g = self._rows(gradient)
            self._gradients += g.T @ g
        self.hidden = None

    def result(self, answers: int) -> Sensitivity:
        """Return the mean moments per input, and the gradients for each answer of the model."""
        moments = self._moments.numpy() / max(self._count, 1)
        return Sensitivity(moments, self._gradients.numpy() / max(answers, 1))

    def _reduce(self, x: torch.Tensor) -> torch.Tensor:
        assert self.a is not None
        if self.type == "embedding":
            return self.a[x]
        if self.type == "conv2d":
            conv: Any = self.module  # peft: its stride and padding, never its dilation or groups
            return torch.nn.functional.conv2d(x, self.a, None, conv.stride, conv.padding)
        return x @ self.a

    def _expand(self, h: torch.Tensor) -> torch.Tensor:
        assert self.b is not None
        return torch.nn.functional.conv2d(h, self.b) if self.type == "conv2d" else h @ self.b

    def _rows(self, h: torch.Tensor) -> torch.Tensor:
        """Return float64[inputs, rank]."""
        wide = h.movedim(1, -1) if self.type == "conv2d" else h
        return wide.reshape(-1, self.rank).double()


def _logits(output: Any, base: BaseModel) -> torch.Tensor:
    found = output.get(LOGITS) if isinstance(output, Mapping) else getattr(output, LOGITS, None)
    if found is None or found.ndim < 2 or found.shape[-1] < 2:
        raise ExportError(
            f"prune_kl compares the model's distributions, and {base.name} gives no logits of two or more classes",
            hint="leave prune_kl out",
        )
    logits: torch.Tensor = found.reshape(-1, found.shape[-1])
    return logits
