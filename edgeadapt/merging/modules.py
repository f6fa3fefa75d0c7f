"""A torch model's modules as numpy needs to know them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from edgeadapt.adapters.adapter import Array, ModuleType, TargetModule
from edgeadapt.merging.fingerprint import module_digest


def target_modules(model: nn.Module) -> dict[str, TargetModule]:
    """Return every module that owns a weight, by its path in `model`.

    A module that is reachable by two paths is listed once, under the first. Weights that are tied are separate
    entries with equal digests.
    """
    digests: dict[int, str] = {}
    found = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")  # noqa: SLF001 - an attribute could be a parametrization or a method
        if weight is None or weight.ndim == 0:
            continue
        if id(weight) not in digests:
            digests[id(weight)] = module_digest(weight)
        found[path] = target_module(path, module, digests[id(weight)])
    return found


def target_module(path: str, module: nn.Module, digest: str) -> TargetModule:
    """Return the description of one module that owns a weight; its arrays are views, read when asked for."""
    weight = module._parameters["weight"]  # noqa: SLF001
    assert weight is not None
    bias = module._parameters.get("bias")  # noqa: SLF001
    kind = module_type(module)
    in_features, out_features = _features(kind, module, tuple(weight.shape))
    return TargetModule(
        path=path,
        type=kind,
        class_name=type(module).__name__,
        weight_shape=tuple(weight.shape),
        in_features=in_features,
        out_features=out_features,
        has_bias=bias is not None,
        digest=digest,
        groups=int(getattr(module, "groups", 1)) if kind == "conv2d" else 1,
        weight=_reader(weight),
        bias=None if bias is None else _reader(bias),
    )


def module_type(module: nn.Module) -> ModuleType:
    """Return what kind of map a module computes.

    A subclass that has a forward of its own ("a linear layer, but ...") computes something else, so it is "other".
    """
    from transformers.pytorch_utils import Conv1D

    plain: tuple[tuple[type[nn.Module], ModuleType], ...] = (
        (nn.Linear, "linear"),
        (Conv1D, "conv1d"),
        (nn.Conv2d, "conv2d"),
        (nn.Embedding, "embedding"),
    )
    for cls, name in plain:
        if isinstance(module, cls):
            return name if type(module).forward is cls.forward and not _called_by_parent(module) else "other"
    weight = module._parameters.get("weight")  # noqa: SLF001
    if "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1:
        return "norm"
    return "other"


def _called_by_parent(module: nn.Module) -> bool:
    """Return whether `module` is the output projection of torch's attention, which uses its weight directly."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _features(kind: ModuleType, module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (in_features, out_features)."""
    if kind == "conv2d":
        return int(getattr(module, "in_channels")), shape[0]  # noqa: B009 - the type checker knows no in_channels
    if kind in {"conv1d", "embedding"}:
        return shape[0], shape[1]
    if kind == "linear":
        return shape[1], shape[0]
    if kind == "norm":
        return shape[0], shape[0]
    return shape[-1], shape[0]


def _reader(parameter: nn.Parameter) -> Callable[[], Array]:
    def read() -> Array:
        array: Array = parameter.detach().to(torch.float32).cpu().numpy()
        if array.flags.writeable:  # a view of the base's own memory, which nobody may change
            array = array.view()
            array.flags.writeable = False
        return array

    return read
