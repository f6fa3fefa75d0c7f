"""LoRA for llama.cpp, as its convert_lora_to_gguf.py writes it and `--lora` reads it.

A file holds one alpha for all modules, and llama.cpp scales a product by alpha / rank, or by 1 where alpha is 0. Here
the scaling of each module (alpha / r, rsLoRA's alpha / sqrt(r), patterns) is in its lora_b; alpha is the rank where all
modules have one, and 0 where they differ: a scale of 1 either way.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeadapt.adapters.adapter import Array, BaseReference, ResolvedAdapter
from edgeadapt.adapters.layouts.gguf import MODULES, with_heads_interleaved
from edgeadapt.adapters.selection import name_some
from edgeadapt.errors import AdapterError
from edgeadapt.pipeline.inputs import head_dim_of

if TYPE_CHECKING:
    from edgeadapt.merging.base_model import BaseModel

DTYPES = ("f32", "f16")

ALIGNMENT_BYTES = 32
_TENSOR_TYPES = {"<f4": 0, "<f2": 1}
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_VERSION, _QUANTIZATION_VERSION = 3, 2
# By transformers' model type, what llama.cpp calls the architecture.
_ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_NAMES = {module: name for name, module in MODULES.items()}
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_HUB_ID = re.compile(r"([\w.-]+)/([\w.-]+)")
_INSTEAD = "edgeadapt export makes a bundle that holds it; for llama.cpp merge it into the base and convert that"


def encode(
    resolved: ResolvedAdapter, base: BaseModel, trained_on: BaseReference, dtype: str
) -> tuple[bytes, dict[str, Any]]:
    """Return a GGUF file of the adapter, and what is in it.

    Args:
        resolved: the adapter, proven against `base`.
        base: its base.
        trained_on: what the adapter says of it.
        dtype: "f32" or "f16".

    Raises:
        AdapterError: llama.cpp has no name for the base or one of the modules, no place for something that the adapter
            does, or a number is too large for float16.
    """
    architecture = _ARCHITECTURES.get(base.model_type)
    if architecture is None:
        raise AdapterError(
            f"{base.name} is a model of the type {base.model_type!r}, for which LoRA is not written as GGUF",
            hint=f"known: {', '.join(sorted(_ARCHITECTURES))}",
        )
    _check_plain(resolved)
    factors = _factors(resolved, base, architecture)
    tensors = {name: _rounded(name, value, dtype) for name, value in factors.items()}
    ranks = {update.rank for update in resolved.sites.values()}
    alpha = float(ranks.pop()) if len(ranks) == 1 else 0.0
    entries = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": resolved.name,
        **_base_entries(trained_on.name),
        "adapter.lora.alpha": alpha,
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    facts = {
        "architecture": architecture,
        "modules": len(resolved.sites),
        "alpha": alpha,
        "largest_rank": max(update.rank for update in resolved.sites.values()),
        "rounding": max(_relative_error(value, tensors[name]) for name, value in factors.items()),
    }
    return dump_gguf(entries, tensors), facts


def dump_gguf(entries: Mapping[str, str | int | float], tensors: Mapping[str, Array]) -> bytes:
    """Return a GGUF file (version 3, little endian), the same bytes for the same content.

    Args:
        entries: metadata; texts, uint32 and float32 numbers.
        tensors: float32 or float16 arrays in torch's axis order.
    """
    out = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(entries)))
    for key, value in entries.items():
        out += _string(key) + _value(value)
    offset = 0
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        out += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", _TENSOR_TYPES[tensor.dtype.str], offset)
        offset += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    for tensor in tensors.values():
        out += bytes(-len(out) % ALIGNMENT_BYTES) + tensor.tobytes()
    return bytes(out + bytes(-len(out) % ALIGNMENT_BYTES))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    return struct.pack("<II", _UINT32, value) if isinstance(value, int) else struct.pack("<If", _FLOAT32, value)


def _check_plain(resolved: ResolvedAdapter) -> None:
    """Refuse what is no low-rank term; llama.cpp's files of adapters hold nothing else."""
    scaled = [path for path, update in resolved.sites.items() if update.terms.keys() & {"gain", "input_gain"}]
    moved = [path for path, update in resolved.sites.items() if update.offset is not None]
    beside = [item.site for item in resolved.bottlenecks] + [item.site for item in resolved.branches]
    found = {
        "virtual tokens before each text": ["its prefix"] if resolved.prefix is not None else [],
        "networks of its own beside modules (bottlenecks and the like)": beside,
        "parameters trained whole (modules_to_save)": sorted(resolved.replaced),
        "outputs or inputs that are scaled (DoRA, IA3 and the like)": scaled,
        "biases": moved,
    }
    for what, places in found.items():
        if places:
            raise AdapterError(
                f"adapter {resolved.name!r} has {what}, which a LoRA file of llama.cpp cannot hold: "
                f"{name_some(places)}",
                hint=_INSTEAD,
            )
    if not resolved.sites:
        raise AdapterError(f"adapter {resolved.name!r} changes nothing", hint="check that it was trained and saved")


def _factors(resolved: ResolvedAdapter, base: BaseModel, architecture: str) -> dict[str, Array]:
    """Return float32 lora_a [rank, in] and lora_b [out, rank] of every module by llama.cpp's names."""
    found = {}
    for path, update in resolved.sites.items():
        assert update.a is not None
        assert update.b is not None
        name, b = _name(resolved, base, path), update.b.T
        if architecture == "llama" and path.endswith(("q_proj", "k_proj")):
            b = _interleaved(base, path, b)
        found[f"{name}.weight.lora_a"] = np.ascontiguousarray(update.a.T)
        found[f"{name}.weight.lora_b"] = np.ascontiguousarray(b)
    return found


def _name(resolved: ResolvedAdapter, base: BaseModel, path: str) -> str:
    """Return what llama.cpp calls a module."""
    module = base.modules[path]
    if path == "lm_head":
        if any(other.type == "embedding" and other.digest == module.digest for other in base.modules.values()):
            raise AdapterError(
                f"adapter {resolved.name!r} changes 'lm_head', which shares its weight with the embedding of "
                f"{base.name}: llama.cpp has no such layer then",
                hint=f"train without lm_head; {_INSTEAD}",
            )
        return "output"
    match = _LAYER.fullmatch(path)
    name = _NAMES.get(match[2]) if match else None
    if match is None or name is None or module.type != "linear":
        raise AdapterError(
            f"adapter {resolved.name!r} changes {path!r} ({module.class_name}), which is no attention, feed-forward "
            "or output layer that a LoRA file of llama.cpp names",
            hint=f"train without it; {_INSTEAD}",
        )
    return f"blk.{match[1]}.{name}"


def _interleaved(base: BaseModel, path: str, b: Array) -> Array:
    head_dim = head_dim_of(base)
    if head_dim is None or head_dim % 2 or b.shape[0] % head_dim:
        raise AdapterError(
            f"the {b.shape[0]} outputs of {path!r} are no whole heads of the size {head_dim}, as llama.cpp orders them",
            hint="give the base that the adapter was trained on",
        )
    return with_heads_interleaved(b, head_dim)


def _rounded(name: str, value: Array, dtype: str) -> Array:
    if dtype == "f32":
        return value.astype("<f4", copy=False)
    with np.errstate(over="ignore"):
        half: Array = value.astype("<f2")
    if not np.isfinite(half).all():
        raise AdapterError(
            f"{name!r} holds {np.abs(value).max():.6g}, too large for float16", hint="write it with --dtype f32"
        )
    return half


def _relative_error(value: Array, written: Array) -> float:
    largest = float(np.abs(value).max())
    return float(np.abs(value - written.astype(np.float32)).max()) / largest if largest else 0.0


def _base_entries(name: str | None) -> dict[str, str | int]:
    """Return what the file says of the base: the last part of its name, and where a hub has it; no folders."""
    if not name:
        return {}
    entries: dict[str, str | int] = {"general.base_model.count": 1}
    match = _HUB_ID.fullmatch(name)
    entries["general.base_model.0.name"] = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    if match:
        entries["general.base_model.0.organization"] = match[1]
        entries["general.base_model.0.repo_url"] = f"https://huggingface.co/{name}"
    return entries
