"""What linear modules see and how much it matters: a model's pass forth and back over samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from edgeadapt.export.frozen import frozen

Cases = Sequence[Mapping[str, torch.Tensor]]
Seen = Callable[[str, torch.Tensor, torch.Tensor | None], None]

LOGITS = "logits"
SEED = 0


def run_both_ways(module: torch.nn.Module, cases: Cases, layers: Mapping[str, torch.nn.Module], seen: Seen) -> int:
    """Run `cases` forth and back, call `seen` for every call of a layer, and return how many answers there were.

    The loss is minus the log-probability of an answer drawn from the model's own distribution, so that squared
    gradients give the Fisher information; models without logits have their outputs summed with random signs. Both are
    drawn from a fixed seed.

    Args:
        module: the model.
        cases: keyword arguments of the forward.
        layers: linear modules inside `module`, by path.
        seen: gets the path, the input float32[..., in], and the gradient at the output float32[..., out], None where
            the loss does not depend on it.
    """
    generator = torch.Generator().manual_seed(SEED)
    waiting: dict[int, tuple[str, torch.Tensor]] = {}

    def hook(path: str) -> Any:
        def keep(_layer: torch.nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            call, x = len(waiting), args[0].detach()
            waiting[call] = (path, x)
            if not y.requires_grad:
                y.requires_grad_()
            y.register_hook(lambda gradient: seen(*waiting.pop(call), gradient))  # type: ignore[no-untyped-call]

        return keep

    handles = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()]
    answers = 0
    try:
        with frozen(module):
            for case in cases:
                loss, count = _loss(module(**case), generator)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                for path, x in waiting.values():
                    seen(path, x, None)
                waiting.clear()
                answers += count
    finally:
        for handle in handles:
            handle.remove()
    return answers


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
