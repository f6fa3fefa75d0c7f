"""An adapter folded into its base's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeadapt.adapters.adapter import Adapter, Array, ResolvedAdapter, SiteUpdate, TargetModule
from edgeadapt.errors import MergeError
from edgeadapt.merging.assets import config_asset
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.fingerprint import module_digest
from edgeadapt.merging.graft import follow_rows, keep_untied, owner_of, set_parameter, share, shared_names
from edgeadapt.merging.modules import target_module
from edgeadapt.slots import INPUT_GAIN_TYPES

# Rows are merged in float64 in pieces of this many numbers, so that a large embedding costs no second copy.
_PIECE = 1 << 22
Wide = NDArray[np.float64]


def merge(base: BaseModel, resolved: ResolvedAdapter) -> BaseModel:
    """Return the base with an adapter folded into its weights: W' = (W · input_gain + ΔW) · gain, and its biases.

    bias' = bias · gain + offset.

    Everything is computed in float64 from the float32 values and cast once. The given base is not changed; the result
    shares the weights that the adapter leaves alone. A weight that is tied to another module's is untied first, so
    only the module that the adapter names changes.

    Raises:
        MergeError: if there is nothing to merge, nothing changes, an update does not fit its module, or a module's
            computation cannot take the update into its weights.
    """
    if resolved.prefix is not None:
        raise MergeError(
            f"adapter {resolved.name!r} begins texts with virtual tokens and changes no weight: it cannot be merged",
            hint="export it without --merge: it costs no more than its tokens",
        )
    check_linear(resolved)
    if not resolved.replaced and not any(update.terms for update in resolved.sites.values()):
        raise MergeError(
            f"adapter {resolved.name!r} has nothing to merge: it changes no module and no parameter",
            hint="check that the adapter was saved after training",
        )
    changes = _changes(base, resolved)
    if not any(_differs(base.module, name, value) for name, value in changes.items()):
        raise MergeError(
            f"merging adapter {resolved.name!r} leaves every weight of {base.name} as it was",
            hint="the adapter is untrained (its B matrices are zero), or too small for float32",
        )
    module = share(base.module)
    untied = _breaks_tie(module, changes)
    _apply(module, changes)
    if untied:
        keep_untied(module)
    return _described(base, module, changes)


def check_linear(resolved: ResolvedAdapter) -> None:
    """Refuse an adapter with bottlenecks or other branches: no weight gives what they give.

    Raises:
        MergeError: if there is one.
    """
    if resolved.bottlenecks:
        raise MergeError(
            f"adapter {resolved.name!r} cannot be merged: it has bottlenecks ({resolved.bottlenecks[0].site!r} first), "
            f"whose activation ({resolved.bottlenecks[0].activation}) is not linear, so they fold into no weight",
            hint="export without --merge; the adapter then stays beside the base and can be swapped",
        )
    if resolved.branches:
        raise MergeError(
            f"adapter {resolved.name!r} cannot be merged: it has networks of its own ({resolved.branches[0].form} "
            f"beside {resolved.branches[0].site!r} first), which fold into no weight",
            hint="export without --merge; the adapter then stays beside the base and can be swapped",
        )


def check_merge(
    base: BaseModel,
    adapter: Adapter,
    merged: BaseModel,
    cases: Sequence[Mapping[str, torch.Tensor]],
    tolerance: float,
) -> float:
    """Return the largest difference between merged and unmerged outputs, relative to the largest unmerged output.

    The unmerged outputs come from the library that saved the adapter. `tolerance` is for that relative difference;
    float32 sums in another order differ by some 1e-6, more in deep models.

    Raises:
        MergeError: if it exceeds `tolerance`, an output is missing or not finite, or there are no cases.
    """
    from edgeadapt.merging.reference import adapter_outputs, model_outputs

    if not cases:
        raise MergeError("there are no cases to check the merge with", hint="give at least one input")
    expected = adapter_outputs(base, adapter, cases)
    worst, where = 0.0, ""
    for index, (case, want) in enumerate(zip(cases, expected, strict=True)):
        got = model_outputs(merged, merged.module, case)
        for name, array in want.items():
            error = _relative_error(array, got.get(name))
            if not error <= worst:  # also true for NaN
                worst, where = error, f"output {name!r} of case {index}"
    if not worst <= tolerance:
        raise MergeError(
            f"merging adapter {adapter.name!r} did not reproduce its unmerged outputs: {where} differs by "
            f"{worst:.3g} of its largest value, {tolerance:.3g} is allowed",
            hint="export without merging; if that is right, report the adapter's configuration as a bug",
        )
    return worst


def merged_weight(target: TargetModule, update: SiteUpdate) -> Array:
    """Return float32 `target`'s weight with the low-rank term added and the gains applied, in torch's layout.

    Raises:
        MergeError: if the update does not fit the module.
    """
    assert target.weight is not None
    weight = target.weight()
    if update.a is None or update.b is None:
        product = None
    else:
        product = _factors(target, update.a, update.b)
        wanted = _flat(weight, target).shape
        if (product[0].shape[0], product[1].shape[1]) != wanted or product[0].shape[1] != product[1].shape[0]:
            raise _misfit(target, f"A {update.a.shape} and B {update.b.shape}")
    gain, input_gain = (None if x is None else x.astype(np.float64) for x in (update.gain, update.input_gain))
    if gain is not None and gain.shape != (target.out_features,):
        raise _misfit(target, f"a gain of shape {gain.shape}")
    inputs = target.in_features if target.type in INPUT_GAIN_TYPES else 0
    if input_gain is not None and input_gain.shape != (inputs,):
        raise _misfit(target, f"an input gain of shape {input_gain.shape}")
    by_row = target.type in _BY_ROW
    return _scaled_sum(_flat(weight, target), product, gain, input_gain, by_row=by_row).reshape(weight.shape)


_BY_ROW = frozenset({"linear", "conv2d", "norm"})  # the output axis of the weight comes first
WEIGHT_TERMS = frozenset({"a", "b", "gain", "input_gain"})
"""Terms of `SiteUpdate` that change a module's weight."""


def _changes(base: BaseModel, resolved: ResolvedAdapter) -> dict[str, Array]:
    """Return the new values of the parameters that change, by name."""
    changes: dict[str, Array] = {}
    for path, update in resolved.sites.items():
        target = base.modules.get(path)
        if target is None:
            raise MergeError(
                f"{base.name} has no module {path!r}, which adapter {resolved.name!r} changes",
                hint="give the base that the adapter was trained on",
            )
        changes |= site_changes(base, target, update)
    for name, value in resolved.replaced.items():
        if name in changes:
            raise MergeError(
                f"adapter {resolved.name!r} both changes and replaces {name}", hint="the adapter is inconsistent"
            )
        _check_replaceable(base, name, value)
        changes[name] = np.asarray(value, dtype=np.float32)
    for name, value in changes.items():
        if not np.isfinite(value).all():
            raise MergeError(
                f"merging adapter {resolved.name!r} makes {name} infinite or NaN", hint="the adapter is damaged"
            )
    return changes


def site_changes(base: BaseModel, target: TargetModule, update: SiteUpdate) -> dict[str, Array]:
    """Return the parameters of one module that an update changes, merged, by name.

    Raises:
        MergeError: if the update does not fit the module, or its computation cannot take it.
    """
    if not update.terms:
        return {}
    if (update.a is None) != (update.b is None):
        raise _misfit(target, "A without B" if update.b is None else "B without A")
    check_site(base, target, update)
    changes: dict[str, Array] = {}
    if update.terms.keys() & WEIGHT_TERMS or target.type == "embedding":
        changes[f"{target.path}.weight"] = merged_weight(target, update)
    if update.offset is not None and update.offset.shape != (target.out_features,):
        raise _misfit(target, f"an offset of shape {update.offset.shape}")
    if target.type == "embedding":  # a table has no bias: its rows take the offset
        if update.offset is not None:
            rows = changes[f"{target.path}.weight"].astype(np.float64) + update.offset.astype(np.float64)
            changes[f"{target.path}.weight"] = rows.astype(np.float32)
    elif update.offset is not None or (update.gain is not None and target.bias is not None):
        changes[f"{target.path}.bias"] = _merged_bias(target, update)
    return changes


def _merged_bias(target: TargetModule, update: SiteUpdate) -> Array:
    bias = np.zeros(target.out_features) if target.bias is None else target.bias().astype(np.float64)
    if update.gain is not None:
        bias = bias * update.gain.astype(np.float64)
    if update.offset is not None:
        bias = bias + update.offset.astype(np.float64)
    with np.errstate(over="ignore"):
        return bias.astype(np.float32)


def check_site(base: BaseModel, target: TargetModule, update: SiteUpdate) -> None:
    """Refuse what a module's own computation cannot take into its weights.

    Raises:
        MergeError: naming the module and the reason.
    """
    low_rank = update.a is not None
    problem = ""
    if target.type == "other":
        problem = f"{target.class_name} is no plain linear, convolution, embedding or norm"
    elif target.type == "norm" and low_rank:
        problem = "a norm takes no low-rank term"
    elif target.type == "norm" and update.offset is not None and not target.has_bias:
        problem = f"{target.class_name} has no bias for the offset"
    elif target.type == "norm" and not _proportional(base.module.get_submodule(target.path)):
        problem = f"the outputs of {target.class_name} are not proportional to its weight"
    elif target.type == "conv2d" and low_rank and target.groups > 1:
        problem = f"a convolution with {target.groups} groups cannot hold a term that mixes its groups"
    elif target.type == "conv2d" and low_rank and base.module.get_submodule(target.path).dilation != (1, 1):
        problem = "the adapter's convolution is not dilated as the base's is"
    if problem:
        raise MergeError(
            f"the update of {target.path} cannot be merged: {problem}", hint="export without merging (swappable)"
        )


def _check_replaceable(base: BaseModel, name: str, value: Array) -> None:
    """Refuse a replaced parameter that the base lacks or has in another shape than a head's first axis."""
    owner, attribute = owner_of(base.module, name)
    old = owner._parameters[attribute]  # noqa: SLF001
    assert old is not None
    if value.ndim != old.ndim or tuple(value.shape[1:]) != tuple(old.shape[1:]):
        raise MergeError(
            f"the new {name} has shape {tuple(value.shape)}, the base's has {tuple(old.shape)}",
            hint="give the base that the adapter was trained on",
        )


def _factors(target: TargetModule, a: Array, b: Array) -> tuple[Wide, Wide]:
    """Return (left float64[rows, rank], right float64[rank, columns]) whose product is ΔW, seen as a matrix."""
    if target.type == "conv2d":
        if a.ndim != 4 or b.ndim != 4 or b.shape[2:] != (1, 1) or a.shape[1:] != target.weight_shape[1:]:
            raise _misfit(target, f"A {a.shape} and B {b.shape}")
        return b[:, :, 0, 0].astype(np.float64), a.reshape(a.shape[0], -1).astype(np.float64)
    if a.ndim != 2 or b.ndim != 2:
        raise _misfit(target, f"A {a.shape} and B {b.shape}")
    if target.type == "linear":
        return b.T.astype(np.float64), a.T.astype(np.float64)
    return a.astype(np.float64), b.astype(np.float64)


def _flat(weight: Array, target: TargetModule) -> Array:
    """Return the weight as a matrix: convolution kernels as rows, a norm's weight as a column."""
    if target.type == "conv2d" or weight.ndim == 1:
        return weight.reshape(weight.shape[0], -1)
    return weight


def _scaled_sum(
    weight: Array, product: tuple[Wide, Wide] | None, gain: Wide | None, input_gain: Wide | None, *, by_row: bool
) -> Array:
    """Return float32 (weight · input_gain + left right) · gain, in pieces of rows.

    `by_row`: the gain is per row and the input gain per column, else the other way round.
    """
    result = np.empty(weight.shape, dtype=np.float32)
    step = max(1, _PIECE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        piece = weight[rows].astype(np.float64)
        if input_gain is not None:
            piece *= _spread(input_gain, rows, by_row=not by_row)
        if product is not None:
            piece += product[0][rows] @ product[1]
        if gain is not None:
            piece *= _spread(gain, rows, by_row=by_row)
        with np.errstate(over="ignore"):  # what overflows is refused with the adapter's and the weight's name
            result[rows] = piece
    return result


def _spread(gain: Wide, rows: slice, *, by_row: bool) -> Wide:
    return gain[rows, None] if by_row else gain[None, :]


def _apply(module: nn.Module, changes: Mapping[str, Array]) -> None:
    for name, value in changes.items():
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        old = owner._parameters.get(attribute)  # noqa: SLF001 - None where a bias is new
        set_parameter(owner, attribute, torch.from_numpy(np.ascontiguousarray(value)))
        if old is not None and old.ndim:
            follow_rows(module, int(old.shape[0]), int(value.shape[0]))


def _breaks_tie(module: nn.Module, changes: Mapping[str, Array]) -> bool:
    """Return whether some of the parameters that are one and the same get values of their own."""
    return any(any(name in changes for name in group) for group in shared_names(module))


def _described(base: BaseModel, module: nn.Module, changes: Mapping[str, Array]) -> BaseModel:
    modules = dict(base.modules)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in changes):
        if path not in modules:
            continue
        owner = module.get_submodule(path)
        fresh = f"{path}.weight" in changes
        digest = module_digest(changes[f"{path}.weight"]) if fresh else modules[path].digest
        modules[path] = target_module(path, owner, digest)
    assets = dict(base.assets)
    if "config.json" in assets:
        assets["config.json"] = config_asset(module.config)
    untrained = tuple(name for name in base.untrained if name not in changes)
    return replace(base, module=module, modules=modules, assets=assets, untrained=untrained)


def _differs(module: nn.Module, name: str, value: Array) -> bool:
    path, _, attribute = name.rpartition(".")
    old: Any = module.get_submodule(path)._parameters.get(attribute)  # noqa: SLF001
    if old is None:
        return bool(np.any(value))
    return tuple(old.shape) != value.shape or not np.array_equal(old.detach().cpu().numpy(), value)


def _proportional(module: nn.Module) -> bool:
    """Return whether doubling a norm's weight and bias doubles its output; Gemma's norms multiply by 1 + weight."""
    probe = share(module)
    size = int(probe.get_parameter("weight").shape[0])
    generator = torch.Generator().manual_seed(0)
    shape = (2, size, 2, 2) if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) else (2, size)
    x = torch.randn(shape, generator=generator)
    with torch.no_grad():
        before = probe(x)
        for attribute in ("weight", "bias"):
            old = probe._parameters.get(attribute)  # noqa: SLF001
            if old is not None:
                set_parameter(probe, attribute, 2 * old)
        return bool(torch.allclose(probe(x), 2 * before, rtol=1e-4, atol=1e-6))


def _misfit(target: TargetModule, what: str) -> MergeError:
    return MergeError(
        f"{what} do not fit {target.path}, a {target.type} module with weight {target.weight_shape}",
        hint="give the base that the adapter was trained on",
    )


def _relative_error(want: Array, got: Array | None) -> float:
    if got is None or got.shape != want.shape:
        return float("inf")
    if want.size == 0:
        return 0.0
    largest = float(np.abs(want).max()) or 1.0
    return float(np.abs(got.astype(np.float64) - want).max()) / largest
