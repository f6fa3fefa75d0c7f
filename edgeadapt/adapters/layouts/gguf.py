"""LoRA as llama.cpp's convert_lora_to_gguf.py writes it: a .gguf file of NAME.weight.lora_a and NAME.weight.lora_b.

In torch's axis order lora_a is [rank, in] and lora_b is [out, rank]; the product is scaled by adapter.lora.alpha over
the rank, or by 1 where alpha is 0 (llama-adapter.h, `get_scale`). Of the architecture "llama" the rows of q and k lie
interleaved; how they are put back depends on the size of the base's heads: see `rows_in_order`.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, BaseReference, TargetModule, TensorRef
from edgeadapt.adapters.fingerprint import FILE_NAME as FINGERPRINT
from edgeadapt.adapters.fingerprint import find_fingerprint
from edgeadapt.adapters.gguf_head import GgufHead, GgufTensor, read_head
from edgeadapt.adapters.peft_files import CONFIG
from edgeadapt.adapters.plain_lora import Pair, check_pair, peft_config, peft_tensors
from edgeadapt.adapters.safetensors_file import check_finite
from edgeadapt.errors import AdapterError

INTERLEAVED = "interleaved_rows"
"""The config's entry for modules whose lora_B still has its rows as llama.cpp needs them."""
_AGAIN = "copy or convert the adapter again"
_TENSOR = re.compile(r"(?P<base>.+)\.weight\.lora_(?P<part>[ab])")
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)")
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The module inside a layer, by what llama.cpp calls it."""
_ARCHITECTURES = ("gemma", "gemma2", "gemma3", "llama", "qwen2", "qwen3")
_USED = frozenset({"adapter.type", "adapter.lora.alpha"})
_UNUSED = frozenset({"adapter.lora.task_name", "adapter.lora.prompt_prefix"})  # what a server shows
# By ggml's type: safetensors' name of the dtype that comes out, values and bytes of a block.
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("F16", 32, 34), 30: ("BF16", 1, 2)}
_Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", 32)])


def holds(folder: Path) -> bool:
    """Tell whether `folder` has a GGUF file that is no model; one that cannot be read counts, and is refused later."""
    return not (folder / CONFIG).is_file() and bool(_files(folder))


def read(name: str, folder: Path, root: Path) -> Adapter:
    """Return the adapter in `folder`; see `edgeadapt.adapters.read`."""
    files = _files(folder)
    if len(files) > 1:
        raise AdapterError(
            f"{folder} holds several GGUF adapters: {', '.join(file.name for file in files)}",
            hint="give each a folder of its own",
        )
    file = files[0]
    head, size = _head(file)
    try:
        architecture, alpha = _settings(head.metadata)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error.message}", hint=error.hint) from error
    pairs = _pairs({tensor.name: _reference(file, head, tensor, size) for tensor in head.tensors}, alpha, file)
    config = peft_config(pairs)
    rotated = [module for module in pairs if module.endswith(("q_proj", "k_proj"))]
    if architecture == "llama" and rotated:
        config[INTERLEAVED] = rotated
    base, warnings = _base(head.metadata, folder, root)
    unused = [f"{key} is not used: it does not change what is computed" for key in _UNUSED & head.metadata.keys()]
    return Adapter(
        *(name, folder, "lora", "gguf", config, peft_tensors(pairs), base), warnings=(*warnings, *sorted(unused))
    )


def fit(adapter: Adapter, modules: Mapping[str, TargetModule], head_dim: int | None) -> Adapter:
    """Return the adapter with the rows of q and k in the base's order; see `rows_in_order`."""
    del modules
    return rows_in_order(adapter, head_dim)


def rows_in_order(adapter: Adapter, head_dim: int | None) -> Adapter:
    """Return the adapter with the rows of q and k in the order of the Hugging Face model.

    GGUF interleaves the two halves of a head that rotary position pairs up; any other adapter is returned as it is.

    Args:
        adapter: of any layout.
        head_dim: the features of one attention head of the base; None if it has none.

    Raises:
        AdapterError: the head's size is needed, and not known or no divisor of the rows.
    """
    modules = adapter.config.get(INTERLEAVED)
    if adapter.layout != "gguf" or not modules:
        return adapter
    tensors = dict(adapter.tensors)
    for module in modules:
        b = tensors[f"{module}.lora_B.weight"]
        if head_dim is None or head_dim % 2 or b.shape[0] % head_dim:
            raise AdapterError(
                f"adapter {adapter.name!r}: the rows of {b.key!r} ({b.shape[0]}) are interleaved by attention heads, "
                f"and the base's have the size {head_dim}",
                hint="give the base that the adapter was trained on",
            )
        tensors[f"{module}.lora_B.weight"] = dataclasses.replace(b, read=partial(_halves_of_heads, b, head_dim))
    config = {key: value for key, value in adapter.config.items() if key != INTERLEAVED}
    return dataclasses.replace(adapter, tensors=tensors, config=config)


def _halves_of_heads(b: TensorRef, head_dim: int) -> Array:
    rows, rank = b.shape
    pairs = b.read().reshape(rows // head_dim, head_dim // 2, 2, rank)
    ordered: Array = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, rank)
    return ordered


def with_heads_interleaved(b: Array, head_dim: int) -> Array:
    """Return the rows of float32[out, rank] as GGUF has those of q and k; undone by `rows_in_order`."""
    rows, rank = b.shape
    halves = b.reshape(rows // head_dim, 2, head_dim // 2, rank)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, rank)


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.gguf")) if file.is_file() and not _is_model(file)]


def _is_model(file: Path) -> bool:
    try:
        return bool(_head(file)[0].metadata.get("general.type", "model") == "model")
    except AdapterError:
        return False


def _head(file: Path) -> tuple[GgufHead, int]:
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read_head(data), len(data)
    except (struct.error, ValueError, OverflowError, RecursionError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(f"{file} is no readable GGUF file: {reason}", hint=_AGAIN) from error


def _settings(metadata: Mapping[str, Any]) -> tuple[str, float]:
    """Return the architecture and alpha; every entry is used, harmless or refused."""
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if metadata.get(key) != wanted:
            raise AdapterError(f"{key} is {metadata.get(key)!r}, not {wanted!r}", hint="give a LoRA adapter")
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise AdapterError(
            f"an adapter for the architecture {architecture!r} is not read from GGUF",
            hint=f"known: {', '.join(_ARCHITECTURES)}; give the adapter as peft saved it",
        )
    if metadata.get("adapter.alora.invocation_tokens"):
        raise AdapterError(
            "adapter.alora.invocation_tokens is set: it acts only after its invocation tokens, which edgeadapt does "
            "not do",
            hint="train it without them",
        )
    known = _USED | _UNUSED | {"adapter.alora.invocation_tokens"}
    unknown = sorted(key for key in metadata if key not in known and not key.startswith("general."))
    if unknown:
        raise AdapterError(
            f"unknown entry {unknown[0]!r}: it may change what is computed", hint="give the adapter as peft saved it"
        )
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < math.inf:
        raise AdapterError(f"adapter.lora.alpha is {alpha!r}, not a number of 0 or more", hint=_AGAIN)
    return str(architecture), float(alpha)


def _pairs(tensors: Mapping[str, TensorRef], alpha: float, file: Path) -> dict[str, Pair]:
    """Return every module's factors; every tensor is part of one."""
    parts: dict[str, dict[str, TensorRef]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        module = None if match is None else _module(match["base"])
        if match is None or module is None:
            raise AdapterError(
                f"tensor {name!r} in {file} is no LoRA factor of an attention, feed-forward or output layer",
                hint="embeddings, norms and experts are not read from GGUF; give the adapter as peft saved it",
            )
        parts.setdefault(module, {})[match["part"]] = tensor
    if not parts:
        raise AdapterError(f"{file} holds no tensor", hint=_AGAIN)
    found = {}
    for module, factors in parts.items():
        if len(factors) < 2:
            there = next(iter(factors.values())).key
            missing = there[:-1] + ("b" if there.endswith("a") else "a")
            raise AdapterError(f"tensor {missing!r} is missing in {file} ({there!r} is there)", hint=_AGAIN)
        rank = factors["a"].shape[0] if factors["a"].shape else 0
        pair = Pair(factors["a"], factors["b"], alpha / rank if alpha and rank else 1.0)
        check_pair(pair)
        found[module] = pair
    return found


def _module(name: str) -> str | None:
    """Return the base's module whose weight has the name `name` in GGUF, None for one that is not read."""
    if name == "output":
        return "lm_head"
    match = _BLOCK.fullmatch(name)
    inside = MODULES.get(match[2]) if match else None
    return None if match is None or inside is None else f"model.layers.{match[1]}.{inside}"


def _reference(file: Path, head: GgufHead, tensor: GgufTensor, size: int) -> TensorRef:
    if tensor.kind not in _TYPES:
        raise AdapterError(
            f"tensor {tensor.name!r} in {file} has ggml's type {tensor.kind}",
            hint="convert the adapter with --outtype f32, f16, bf16 or q8_0",
        )
    dtype, block, block_bytes = _TYPES[tensor.kind]
    count, start = math.prod(tensor.shape), head.start + tensor.offset
    if not tensor.shape or tensor.shape[-1] % block or start + count // block * block_bytes > size:
        raise AdapterError(
            f"tensor {tensor.name!r} of shape {list(tensor.shape)} does not fit into {file}, which has {size} bytes",
            hint=_AGAIN,
        )
    return TensorRef(tensor.name, tensor.shape, dtype, file, partial(_values, file, tensor, start))


def _values(file: Path, tensor: GgufTensor, start: int) -> Array:
    """Return a tensor as float32[shape]; NaN and infinity are refused."""
    count = math.prod(tensor.shape)
    if tensor.kind == 8:
        blocks = np.fromfile(file, _Q8_0, count // 32, offset=start)
        values: Array = blocks["values"].astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]
    elif tensor.kind == 30:  # bfloat16: the upper half of a float32
        values = (np.fromfile(file, "<u2", count, offset=start).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.fromfile(file, "<f2" if tensor.kind else "<f4", count, offset=start).astype(np.float32)
    return check_finite(values.reshape(tensor.shape), tensor.name, file)


def _base(metadata: Mapping[str, Any], folder: Path, root: Path) -> tuple[BaseReference, list[str]]:
    name = metadata.get("general.base_model.0.name")
    found = find_fingerprint(folder, root, name if isinstance(name, str) and name else None, None)
    warnings = []
    if found.fingerprint is None:
        warnings.append(f"no {FINGERPRINT}: only the base's module names and shapes can be checked")
    if found.name is None:
        warnings.append("no general.base_model.0.name: the adapter does not say which base it was trained on")
    return found, warnings
