"""LoRA as peft saves it: LoRA, rsLoRA, DoRA, rank and alpha patterns, lora_bias, trained biases, saved modules.

y' = y + s B A x for linear, conv1d (GPT-2), conv2d and embedding modules; see `edgeadapt.adapters.low_rank`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from edgeadapt.adapters.adapter import Adapter, Library, ResolvedAdapter, TargetModule, TensorRef
from edgeadapt.adapters.kinds._lora_config import check_config
from edgeadapt.adapters.kinds._lora_resolve import resolve_lora
from edgeadapt.adapters.kinds._lora_tensors import LORA_TERMS, factor_keys, is_training_state, split_keys
from edgeadapt.adapters.selection import pattern_matches
from edgeadapt.errors import AdapterError

TERMS = LORA_TERMS
_GATHER = (
    "gather the shards before saving (ZeRO-3: deepspeed.zero.GatheredParameters; FSDP: summon_full_params), or convert "
    "the checkpoint"
)
_SAVE_AGAIN = "save the adapter again with peft's save_pretrained"


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "peft" and config.get("peft_type") == "LORA"


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`.

    Raises:
        AdapterError: `config` means a computation that edgeadapt does not do, or is damaged.
    """
    return check_config(config)


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors, as far as they can be judged without the base.

    Raises:
        AdapterError: a factor is missing, empty or of a wrong kind.
    """
    for key, tensor in adapter.tensors.items():
        if 0 in tensor.shape and not is_training_state(key):
            raise AdapterError(
                f"tensor {tensor.key!r} in {tensor.file} is empty (shape {list(tensor.shape)}): a shard of a "
                "partitioned training was saved, not the whole",
                hint=_GATHER,
            )
    changed = {module: parts for module, parts in split_keys(adapter.tensors).items() if factor_keys(parts)}
    if not changed:
        raise AdapterError(f"{_file(adapter)} holds no LoRA tensor", hint=_SAVE_AGAIN)
    for module, parts in changed.items():
        _check_module(adapter, module, parts)
    return tuple(
        f"{key} {pattern!r} matches no module that the adapter changes (peft ignores it too)"
        for key in ("rank_pattern", "alpha_pattern")
        for pattern in adapter.config.get(key) or ()
        if not any(pattern_matches(pattern, module) for module in changed)
    )


def _check_module(adapter: Adapter, module: str, parts: Mapping[str, TensorRef]) -> None:
    """Check that one module's factors are there, and only those that the config asks for."""
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    wanted = {"lora_embedding_A", "lora_embedding_B"} if embedding else {"lora_A.weight", "lora_B.weight"}
    if adapter.config.get("use_dora"):
        wanted.add("lora_magnitude_vector")
    if adapter.config.get("lora_bias") and not embedding:
        wanted.add("lora_B.bias")
    found = factor_keys(parts)
    if missing := wanted - found:
        there = sorted(found & wanted) or sorted(found)
        raise AdapterError(
            f"tensor '{module}.{min(missing)}' is missing in {_file(adapter)} ('{module}.{there[0]}' is there)",
            hint=_SAVE_AGAIN,
        )
    if extra := found - wanted:
        raise AdapterError(
            f"tensor {parts[min(extra)].key!r} in {_file(adapter)} does not fit its config: use_dora is "
            f"{bool(adapter.config.get('use_dora'))}, lora_bias is {bool(adapter.config.get('lora_bias'))}",
            hint=_SAVE_AGAIN,
        )
    for part in sorted(wanted):
        if not parts[part].dtype.startswith(("F", "BF")):
            raise AdapterError(
                f"tensor {parts[part].key!r} in {_file(adapter)} has dtype {parts[part].dtype}",
                hint="save the adapter in float32, float16 or bfloat16",
            )


def _file(adapter: Adapter) -> str:
    return str(next(iter(adapter.tensors.values())).file)


def resolve(
    adapter: Adapter, modules: Mapping[str, TargetModule], base_name: str | None, library: Library | None
) -> ResolvedAdapter:
    """Return the adapter as arrays, proven complete against the base's `modules`; its tensors say it all.

    Raises:
        AdapterError: a selected module has no tensors, a tensor has no use, or the base does not fit.
    """
    del library
    if "interleaved_rows" in adapter.config:
        raise AdapterError(
            f"the rows of {len(adapter.config['interleaved_rows'])} modules are in GGUF's order, not the base's",
            hint="put them in order first: edgeadapt.adapters.layouts.gguf.rows_in_order",
        )
    return resolve_lora(adapter, modules, base_name)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    config = adapter.config
    changed = {module: parts for module, parts in split_keys(adapter.tensors).items() if factor_keys(parts)}
    ranks = Counter((parts.get("lora_A.weight") or parts["lora_embedding_A"]).shape[0] for parts in changed.values())
    dora = bool(config.get("use_dora"))
    return {
        "variant": _variant(config),
        "rank": {"min": min(ranks), "max": max(ranks), "modules": {str(r): n for r, n in sorted(ranks.items())}},
        "alpha": config["lora_alpha"],
        "alpha_pattern": dict(config.get("alpha_pattern") or {}),
        "scaling": "alpha / sqrt(rank)" if config.get("use_rslora") else "alpha / rank",
        "target_modules": {"count": len(changed), "names": sorted({path.rpartition(".")[2] for path in changed})},
        "modules_to_save": sorted(config.get("modules_to_save") or ()),
        "trained_biases": config.get("bias", "none"),
        "merge": _merge(changed),
        "swap": {"possible": True, "reason": _swap_reason(dora)},
        "needs_base_weights": dora or config.get("bias", "none") != "none",
    }


def _variant(config: Mapping[str, Any]) -> dict[str, bool]:
    return {
        "rslora": bool(config.get("use_rslora")),
        "dora": bool(config.get("use_dora")),
        "lora_bias": bool(config.get("lora_bias")),
        "rank_pattern": bool(config.get("rank_pattern")),
        "alpha_pattern": bool(config.get("alpha_pattern")),
    }


def _merge(changed: Mapping[str, Mapping[str, TensorRef]]) -> dict[str, Any]:
    """Return whether the adapter folds into its base. A grouped convolution's B has fewer columns than A has rows."""
    for module, parts in changed.items():
        if "lora_B.weight" in parts and parts["lora_B.weight"].shape[1] != parts["lora_A.weight"].shape[0]:
            return {"exact": False, "reason": f"module {module!r} is a grouped convolution, and LoRA mixes its groups"}
    return {"exact": True, "reason": "the change is linear in the module's input and folds into its weight"}


def _swap_reason(dora: bool) -> str:
    return "a low-rank term and a gain per output" if dora else "a low-rank term beside each module"
