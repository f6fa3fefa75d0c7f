"""Tensors of a safetensors file, by hand: BF16 without torch, and no byte that the header does not explain.

Layout (safetensors' README, "Format"): 8 bytes header length N, little endian; N bytes JSON; tensor data.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgeadapt.adapters.adapter import Array, TensorRef
from edgeadapt.errors import AdapterError

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_AGAIN = "copy or download the adapter again; nothing can be repaired from this file"
_DTYPES: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,  # numpy has no bfloat16: the upper half of a float32
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_tensors(file: Path) -> dict[str, TensorRef]:
    """Return the tensors of `file` by key, checked against its header and size; no tensor is read yet.

    Raises:
        AdapterError: the file cannot be read, is truncated, damaged or empty, or holds an unknown dtype.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header, data_start = _header(stream, size, file)
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror}", hint="check the file's permissions") from error
    entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
    if not entries:
        raise AdapterError(f"{file} holds no tensor", hint="save the adapter again after training")
    spans = []
    tensors = {}
    for key, entry in entries.items():
        dtype, shape, begin, end = _entry(key, entry, file)
        spans.append((begin, end, key))
        read = partial(_read, file, key, dtype, shape, data_start + begin)
        tensors[key] = TensorRef(key=key, shape=shape, dtype=dtype, file=file, read=read)
    _check_spans(sorted(spans), size - data_start, file)
    return tensors


def _header(stream: BinaryIO, size: int, file: Path) -> tuple[dict[str, Any], int]:
    length = stream.read(8)
    if length == b"version ":  # "version https://git-lfs.github.com/spec/v1"
        raise AdapterError(f"{file} is a Git LFS pointer, not the tensors", hint="fetch them with `git lfs pull`")
    header_bytes = int.from_bytes(length, "little")
    if len(length) < 8 or header_bytes > size - 8:
        raise AdapterError(
            f"{file} is truncated or no safetensors file: its header needs {header_bytes} bytes, the file has {size}",
            hint=_AGAIN,
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise AdapterError(f"{file} has a header of {header_bytes} bytes, over {MAX_HEADER_BYTES}", hint=_AGAIN)
    try:
        header = json.loads(stream.read(header_bytes), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} has a damaged header: {error}", hint=_AGAIN) from error
    if not isinstance(header, dict):
        raise AdapterError(f"{file} has a damaged header: no JSON object", hint=_AGAIN)
    return header, 8 + header_bytes


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return result


def _entry(key: str, entry: Any, file: Path) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise AdapterError(f"{file} has a damaged header entry for tensor {key!r}", hint=_AGAIN) from error
    if not whole:
        raise AdapterError(f"{file} has a damaged header entry for tensor {key!r}", hint=_AGAIN)
    if dtype not in _DTYPES:
        raise AdapterError(
            f"tensor {key!r} in {file} has dtype {dtype}",
            hint=f"save the adapter in float32, float16 or bfloat16 (known: {', '.join(_DTYPES)})",
        )
    if math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize != end - begin:
        raise AdapterError(
            f"tensor {key!r} in {file} has {end - begin} bytes, but its shape {list(shape)} in {dtype} needs "
            f"{math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize}",
            hint=_AGAIN,
        )
    return dtype, shape, begin, end


def _check_spans(spans: list[tuple[int, int, str]], data_bytes: int, file: Path) -> None:
    position = 0
    for begin, end, key in spans:
        if begin != position:
            raise AdapterError(
                f"{file} is damaged: tensor {key!r} starts at data byte {begin}, not at {position}", hint=_AGAIN
            )
        if end > data_bytes:
            raise AdapterError(
                f"{file} is truncated: tensor {key!r} ends at data byte {end}, the file has {data_bytes}", hint=_AGAIN
            )
        position = end
    if position != data_bytes:
        raise AdapterError(f"{file} is damaged: {data_bytes - position} bytes after the last tensor", hint=_AGAIN)


def _read(file: Path, key: str, dtype: str, shape: tuple[int, ...], start: int) -> Array:
    """Return the tensor as float32[shape], integers as saved; NaN and infinity are refused."""
    try:
        raw = np.fromfile(file, dtype=_DTYPES[dtype], count=math.prod(shape), offset=start)
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror}", hint="check the file's permissions") from error
    if raw.size != math.prod(shape):
        raise AdapterError(f"{file} became shorter while it was read (tensor {key!r})", hint=_AGAIN)
    if dtype == "BF16":
        values: Array = (raw.astype(np.uint32) << 16).view(np.float32)
    elif dtype.startswith("F"):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused below
            values = raw.astype(np.float32)
    else:
        return raw.reshape(shape)
    return check_finite(values.reshape(shape), key, file)


def check_finite(values: Array, key: str, file: Path) -> Array:
    """Return `values`, the tensor `key` of `file`, if all of them are finite.

    Raises:
        AdapterError: one is NaN or infinite.
    """
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        index = [int(i) for i in np.unravel_index(int(bad[0]), values.shape)]
        raise AdapterError(
            f"tensor {key!r} in {file} holds values that are not finite: {bad.size} of {values.size}, "
            f"the first at {index}",
            hint="the training diverged or the file is damaged: use an earlier checkpoint",
        )
    return values
