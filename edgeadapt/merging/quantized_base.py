"""QLoRA: which base an adapter belongs on, and what it would cost to put it on the other one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from edgeadapt.adapters.adapter import Adapter, ResolvedAdapter
from edgeadapt.errors import MergeError
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.fingerprint import module_digest
from edgeadapt.merging.graft import set_parameter, share
from edgeadapt.merging.merge import merged_weight
from edgeadapt.merging.modules import target_module
from edgeadapt.merging.nf4 import as_trained_on_nf4

MERGE_BASES = ("dequantized", "original")


def as_nf4(base: BaseModel) -> BaseModel:
    """Return `base` with its linear weights rounded through NF4 with double quantization, as QLoRA loads it.

    What bitsandbytes leaves alone is left alone: the output embedding (lm_head), a classification head, tied weights,
    embeddings, norms and convolutions. The given base is not changed and shares all other weights.

    Raises:
        MergeError: if there is no linear weight to round.
    """
    module = share(base.module)
    skipped = _kept_in_full(module)
    modules = dict(base.modules)
    for path, target in base.modules.items():
        if target.type not in {"linear", "conv1d"} or path in skipped:
            continue
        owner = module.get_submodule(path)
        weight = owner.weight
        assert isinstance(weight, torch.Tensor)
        turned = target.type == "conv1d"  # bitsandbytes quantizes [out, in] rows, also of GPT-2's [in, out] weights
        rounded = as_trained_on_nf4(weight.T if turned else weight)
        set_parameter(owner, "weight", rounded.T.contiguous() if turned else rounded)
        modules[path] = target_module(path, owner, module_digest(rounded.T if turned else rounded))
    if all(modules[path] is base.modules[path] for path in modules):
        raise MergeError(f"{base.name} has no linear weight that NF4 would round", hint="leave NF4 out for this base")
    return replace(base, module=module, modules=modules, quantized_from="nf4")


def trained_on_nf4(adapter: Adapter) -> bool:
    """Return whether an adapter says that it was trained on an NF4 base: by its stamp, or by its base's name."""
    return adapter.base.quantization == "nf4" or "bnb-4bit" in (adapter.base.name or "").lower()


def base_for_merge(base: BaseModel, adapter: Adapter, merge_base: str | None = None) -> BaseModel:
    """Return the base to merge `adapter` into: "dequantized" (from NF4) or "original" (full precision) weights.

    Without a choice, an adapter that was trained on NF4 goes into the dequantized weights, which are exactly what it
    was trained with; any other goes into the base as given.

    Raises:
        MergeError: if the choice is unknown, or the original is wanted of a folder that holds only NF4 weights.
    """
    if merge_base not in {None, *MERGE_BASES}:
        raise MergeError(f"unknown merge base {merge_base!r}", hint=f"known: {', '.join(MERGE_BASES)}")
    if base.quantized_from == "nf4":
        if merge_base == "original":
            raise MergeError(
                f"{base.name} holds only NF4 weights, so adapter {adapter.name!r} cannot be merged into the original",
                hint="give the full-precision model as base, or merge into the dequantized one",
            )
        return base
    wanted = merge_base or ("dequantized" if trained_on_nf4(adapter) else "original")
    return as_nf4(base) if wanted == "dequantized" else base


def merge_error_ratio(original: BaseModel, dequantized: BaseModel, resolved: ResolvedAdapter) -> dict[str, float]:
    """Return |W - dequantized W| / |ΔW| (Frobenius norms) for each module that the adapter changes and NF4 rounded.

    Above 1 the rounding of the base is larger than what the adapter does there: merging into the other base than the
    one that it was trained on replaces a larger error than the whole adapter.

    Raises:
        MergeError: if NF4 rounded none of the adapter's modules.
    """
    ratios = {}
    for path, update in resolved.sites.items():
        one, other = original.modules.get(path), dequantized.modules.get(path)
        if one is None or other is None or one.weight is None or other.weight is None or one.digest == other.digest:
            continue
        weight = other.weight().astype(np.float64)
        change = np.linalg.norm(merged_weight(other, update).astype(np.float64) - weight)
        rounding = np.linalg.norm(one.weight().astype(np.float64) - weight)
        ratios[path] = float(rounding / change) if change else float("inf")
    if not ratios:
        raise MergeError(
            f"NF4 rounded no module that adapter {resolved.name!r} changes",
            hint="merge into the original base; the two are the same for this adapter",
        )
    return ratios


def summary_of_ratios(ratios: dict[str, float]) -> str:
    """Return the ratios in one sentence for people."""
    values = sorted(ratios.values())
    worst = max(ratios, key=lambda path: ratios[path])
    median = float(np.median(values))
    return (
        f"rounding of the base against the adapter's change: median {median:.2f}, "
        f"worst {ratios[worst]:.2f} at {worst}, in {len(values)} modules"
    )


def _kept_in_full(module: Any) -> set[str]:
    """Return the paths that transformers' bitsandbytes integration does not quantize."""
    skipped = set()
    parameters: dict[int, list[str]] = {}
    for path, part in module.named_modules():
        for parameter in part._parameters.values():  # noqa: SLF001
            if parameter is not None:
                parameters.setdefault(id(parameter), []).append(path)
    for paths in parameters.values():
        if len(paths) > 1:
            skipped.update(paths)
    embedding = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    skipped |= {path for path, part in module.named_modules() if part is embedding}
    if not skipped:  # neither tied weights nor an output embedding: the last module, a classification head
        skipped.add(list(module.named_parameters())[-1][0].rpartition(".")[0])
    return skipped
