"""Virtual tokens as peft saves them: PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING, CPT.

All a decoder ever sees of such an adapter is what its key-value cache holds before the first token. The first two save
just that; the others save embeddings, which the float base is run over once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, Library, Prefix, ResolvedAdapter, TargetModule, TensorRef
from edgeadapt.adapters.fingerprint import check_digest
from edgeadapt.adapters.kinds._virtual_config import CACHES, MULTITASK, TYPES, check_config
from edgeadapt.errors import AdapterError

KINDS: Mapping[str, str] = {
    "cartridge": "Cartridge: a trained beginning of the key-value cache, some of it frozen",
    "cpt": "CPT: a trained context in the text's embeddings",
    "multitask_prompt_tuning": "multitask prompt tuning: a shared prompt times a low-rank one per task",
    "p_tuning": "P-tuning: a prompt that a small network wrote",
    "prefix_tuning": "prefix tuning: a trained beginning of the key-value cache",
    "prompt_tuning": "prompt tuning: trained embeddings before the text's",
}
TERMS: frozenset[str] = frozenset()
_TOKENS = "prompt_embeddings"
_SAVE_AGAIN = "save the adapter again with peft's save_pretrained"


def claims(layout: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the files in `layout` with `config` are of this kind."""
    return layout == "peft" and config.get("peft_type") in TYPES


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the kind's name: peft's own, in lower case."""
    return str(config["peft_type"]).lower()


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about `config`.

    Raises:
        AdapterError: `config` means a computation that edgeadapt does not do, or is damaged.
    """
    check_config(config)
    return ()


def check_tensors(adapter: Adapter) -> tuple[str, ...]:
    """Return warnings about the adapter's tensors, as far as they can be judged without the base.

    Raises:
        AdapterError: a tensor is missing, has no use, or has another shape than the config says.
    """
    wanted = _shapes(adapter.config)
    file = next(iter(adapter.tensors.values())).file
    for key, shape in wanted.items():
        if key not in adapter.tensors:
            raise AdapterError(f"tensor {key!r} is missing in {file}", hint=_SAVE_AGAIN)
        _check_tensor(adapter.tensors[key], shape)
    if extra := sorted(adapter.tensors.keys() - wanted.keys()):
        raise AdapterError(
            f"tensor {adapter.tensors[extra[0]].key!r} in {file} has no use in {adapter.config['peft_type']}",
            hint="save the adapter again without it (save_embedding_layers=False)",
        )
    return ()


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """Return what the file must hold, None for an axis that only the base knows."""
    tokens, width = config["num_virtual_tokens"], config.get("token_dim")
    if config["peft_type"] in CACHES:
        return {_TOKENS: (tokens, config["num_layers"] * 2 * config["token_dim"])}
    shapes: dict[str, tuple[int | None, ...]] = {_TOKENS: (tokens, width)}
    if config["peft_type"] == MULTITASK:
        tasks, ranks = config["num_tasks"], config["num_ranks"]
        shapes |= {"prefix_task_cols": (tasks, tokens, ranks), "prefix_task_rows": (tasks, ranks, width)}
    return shapes


def _check_tensor(tensor: TensorRef, wanted: tuple[int | None, ...]) -> None:
    fits = len(tensor.shape) == len(wanted)
    if not fits or any(want not in (None, have) for want, have in zip(wanted, tensor.shape, strict=True)):
        shown = ", ".join("?" if axis is None else str(axis) for axis in wanted)
        raise AdapterError(
            f"tensor {tensor.key!r} in {tensor.file} has shape {list(tensor.shape)}, its config needs [{shown}]",
            hint="copy the adapter_config.json that was saved with these tensors",
        )
    if not tensor.dtype.startswith(("F", "BF")):
        raise AdapterError(
            f"tensor {tensor.key!r} in {tensor.file} has dtype {tensor.dtype}",
            hint="save the adapter in float32, float16 or bfloat16",
        )


def expand(adapter: Adapter) -> tuple[Adapter, ...]:
    """Return the adapters in one file: one for each task of several."""
    tasks = adapter.config["num_tasks"] if adapter.config["peft_type"] == MULTITASK else 1
    if tasks == 1:
        return (replace(adapter, task_id=0 if adapter.config["peft_type"] == MULTITASK else None),)
    return tuple(replace(adapter, name=f"{adapter.name}-task{task}", task_id=task) for task in range(tasks))


def resolve(
    adapter: Adapter,
    modules: Mapping[str, TargetModule],
    base_name: str | None = None,
    library: Library | None = None,
) -> ResolvedAdapter:
    """Return the adapter as keys and values. Without a `library` only what the file holds as such can be had.

    Raises:
        AdapterError: a tensor cannot be read or is not finite, the base is another one, or the float base is needed
            and not at hand.
    """
    for path, module in modules.items():
        check_digest(adapter.base, (path,), module, base_name)
    for tensor in adapter.tensors.values():
        tensor.read()  # which refuses values that are not finite; torch would compute with them
    if library is not None:
        layers = library.past(adapter)
        prefix = Prefix(tuple(key for key, _ in layers), tuple(value for _, value in layers))
    elif adapter.config["peft_type"] in CACHES:
        prefix = _saved(adapter.tensors[_TOKENS].read(), adapter.config)
    else:
        raise AdapterError(
            f"{adapter.config['peft_type']} holds embeddings: the float base must be run over them once, and a bundle "
            "does not hold it",
            hint="pass the base with --base, or export the bundle again together with this adapter",
        )
    return ResolvedAdapter(adapter.name, adapter.kind, {}, {}, prefix)


def _saved(values: Array, config: Mapping[str, Any]) -> Prefix:
    """Return what peft makes of float32[tokens, layers * 2 * heads * dim]: keys (after rotary) before values."""
    heads = config["num_attention_heads"]
    parts = values.reshape(len(values), config["num_layers"], 2, heads, config["token_dim"] // heads)
    parts = np.ascontiguousarray(parts.transpose(1, 2, 3, 0, 4), np.float32)
    return Prefix(tuple(layer[0] for layer in parts), tuple(layer[1] for layer in parts))


def describe(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to know of the adapter without its base, JSON-able."""
    held = adapter.config["peft_type"] in CACHES
    what = "keys and values of its tokens" if held else "embeddings of its tokens, run through the base once at export"
    return {
        "variant": adapter.config["peft_type"],
        "virtual_tokens": adapter.config["num_virtual_tokens"],
        "task_id": adapter.task_id,
        "merge": {"exact": False, "reason": "no weight changes: the text begins with virtual tokens"},
        "swap": {"possible": True, "reason": what},
        "needs_base_weights": not held,
    }
