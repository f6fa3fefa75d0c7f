"""LoRA in ONNX Runtime's adapter files, as Olive writes them and as edgeadapt's own bundles hold them.

A file MODULE.lora_A[.default][.MatMul][.weight] is float[in, rank] and its lora_B float[rank, out], with the scaling in
it: what a graph multiplies by (Olive's convert-adapters and ExtractAdapters, onnxruntime-genai's names, edgeadapt's).
What Olive extracts from a graph with transpositions that were not folded is as in torch, [rank, in] and [out, rank].
Where both can be meant the base decides: see `fit`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, TargetModule, TensorRef
from edgeadapt.adapters.fingerprint import FILE_NAME as FINGERPRINT
from edgeadapt.adapters.fingerprint import find_fingerprint
from edgeadapt.adapters.peft_files import CONFIG
from edgeadapt.adapters.plain_lora import Pair, check_pair, peft_config, peft_tensors, transposed
from edgeadapt.errors import AdapterError, BundleError
from edgeadapt.onnx_adapter import read_onnx_adapter

SUFFIX = ".onnx_adapter"
_RESIDUAL = "residual.onnx_adapter"  # of a bundle's graph: what 4 bits left of the base's weights, no adapter
_AGAIN = "copy or write the file again from where the adapter was trained"
_PLAIN = "only LoRA's two factors are read from this format; give the adapter as it was trained"
_FLOATS = "write it in float32 or float16 (Olive's convert-adapters without --quantize_int4)"
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?(?:\.MatMul)?(?:\.weight)?")
_PREFIX = "base_model.model."
_SCALE = ".scale"
_DTYPES = {"float32": "F32", "float16": "F16"}
# onnxruntime-genai's name for the part of a layer that transformers calls otherwise.
_GENAI = (".attn.", ".self_attn.")


def holds(folder: Path) -> bool:
    """Tell whether `folder` has a file with this ending, and no config."""
    return not (folder / CONFIG).is_file() and bool(_files(folder))


def read(name: str, folder: Path, root: Path) -> Adapter:
    """Return the adapter in `folder`; see `edgeadapt.adapters.read`."""
    files = _files(folder)
    if len(files) > 1:
        raise AdapterError(
            f"{folder} holds several adapters: {', '.join(file.name for file in files)}",
            hint="give each a folder of its own",
        )
    pairs = _pairs(_tensors(files[0]), files[0])
    base = find_fingerprint(folder, root, None, None)
    warnings = ["the file does not say which base it was trained on"]
    if base.fingerprint is None:
        warnings.append(f"no {FINGERPRINT}: only the base's module names and shapes can be checked")
    return Adapter(name, folder, "lora", "onnx_adapter", peft_config(pairs), peft_tensors(pairs), base, tuple(warnings))


def fit(adapter: Adapter, modules: Mapping[str, TargetModule], head_dim: int | None) -> Adapter:
    """Return the adapter with the base's names, and with factors turned that only so fit the base's shapes.

    Raises:
        AdapterError: factors fit the base either way, and their names do not say which.
    """
    del head_dim
    found = {}
    for name in sorted({key.partition(".lora_")[0] for key in adapter.tensors}):
        a, b = (adapter.tensors[f"{name}.lora_{part}.weight"] for part in "AB")
        path = name if name in modules or name.replace(*_GENAI) not in modules else name.replace(*_GENAI)
        pair = Pair(a, b, 1.0)
        if a.shape == b.shape[::-1] and path in modules:
            pair = _as_base(pair, modules[path])
        found[path] = pair
    if len(found) < len(adapter.tensors) // 2:
        raise AdapterError(f"adapter {adapter.name!r} names modules twice, as .attn. and .self_attn.", hint=_AGAIN)
    return dataclasses.replace(adapter, tensors=peft_tensors(found), config=peft_config(found))


def _as_base(pair: Pair, module: TargetModule) -> Pair:
    """Return a pair whose factors can be read in two ways as that which fits a module as wide as it is high."""
    rank, width = pair.a.shape
    if rank == width and ".default." in pair.a.key:
        raise AdapterError(
            f"tensors {pair.a.key!r} and {pair.b.key!r} in {pair.a.file} are [{rank}, {rank}]: whether they are "
            "transposed is said neither by their shapes nor by their names",
            hint="give the adapter as peft saved it",
        )
    if width != module.in_features and rank == module.in_features:
        return Pair(transposed(pair.a), transposed(pair.b), pair.scale)
    return pair


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob(f"*{SUFFIX}")) if file.is_file() and file.name != _RESIDUAL]


def _tensors(file: Path) -> dict[str, TensorRef]:
    """Return the file's tensors; those that edgeadapt stored as int8 with their scales in them."""
    try:
        arrays = read_onnx_adapter(file).tensors
    except BundleError as error:
        hint = _FLOATS if "has data type" in error.message else _AGAIN
        raise AdapterError(error.message, hint=hint) from error
    scaled = {name for name, array in arrays.items() if array.dtype == np.int8}
    found = {}
    for name, array in arrays.items():
        if name in scaled:
            array = _with_scale(name, arrays, file)  # noqa: PLW2901
        elif name.removesuffix(_SCALE) in scaled:
            continue
        found[name] = _reference(name, array, file)
    return found


def _reference(name: str, array: Array, file: Path) -> TensorRef:
    return TensorRef(name, array.shape, _DTYPES[array.dtype.name], file, lambda: array.astype(np.float32))


def _with_scale(name: str, arrays: Mapping[str, Array], file: Path) -> Array:
    """Return int8 codes times their scale, as docs/formats/bundle-1.md has it."""
    codes, scale = arrays[name], arrays.get(name + _SCALE)
    fits = scale is not None and scale.dtype == np.float32 and scale.ndim == codes.ndim
    if scale is None or not fits or any(s not in (1, n) for s, n in zip(scale.shape, codes.shape, strict=True)):
        raise AdapterError(f"tensor {name!r} in {file} is int8 without a scale '{name}{_SCALE}' that fits", hint=_AGAIN)
    return codes.astype(np.float32) * scale


def _pairs(tensors: Mapping[str, TensorRef], file: Path) -> dict[str, Pair]:
    """Return every module's factors in peft's layouts; every tensor is one of them."""
    modules: dict[str, dict[str, TensorRef]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise AdapterError(f"tensor {name!r} in {file} is no factor of a LoRA adapter", hint=_PLAIN)
        parts = modules.setdefault(match["module"].removeprefix(_PREFIX), {})
        if match["part"] in parts:
            raise AdapterError(f"tensors {parts[match['part']].key!r} and {name!r} in {file} are one", hint=_AGAIN)
        parts[match["part"]] = tensor
    found = {}
    for module, parts in modules.items():
        if len(parts) < 2:
            there, missing = ("A", "B") if "A" in parts else ("B", "A")
            raise AdapterError(
                f"the factor lora_{missing} of module {module!r} is missing in {file} ({parts[there].key!r} is there)",
                hint=_AGAIN,
            )
        found[module] = _pair(parts["A"], parts["B"])
    return found


def _pair(a: TensorRef, b: TensorRef) -> Pair:
    """Return two factors in peft's layouts, as a graph has them where that makes a product, else as torch."""
    matrices = len(a.shape) == len(b.shape) == 2
    as_torch = matrices and a.shape[1] != b.shape[0] and a.shape[0] == b.shape[1]
    pair = Pair(a, b, 1.0) if as_torch else Pair(transposed(a), transposed(b), 1.0)
    check_pair(pair)
    return pair
