"""Tensors of a file that `torch.save` wrote, without torch and without running anything that the file says.

The file is a zip archive (torch 1.6 and later): NAME/data.pkl, a pickle of the tensors' table, and one NAME/data/KEY
per storage, uncompressed. A pickle is a program. This reader goes through its instructions with `pickletools.genops`,
which only takes them apart, and carries out the few that build a table of tensors: texts, numbers, tuples, dicts, and
the two names below that torch writes for a tensor. At any other instruction or name it stops, before anything is done
for it: nothing is imported, called or evaluated.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgeadapt.adapters.adapter import Array, TensorRef
from edgeadapt.adapters.safetensors_file import check_finite
from edgeadapt.errors import AdapterError

MAX_TABLE_BYTES = 1 << 26
_AGAIN = "copy or download the adapter again; nothing can be repaired from this file"
_SAVE_AGAIN = "save the adapter again with save_adapter(..., use_safetensors=True) where it was trained"
_STORAGES: Mapping[str, tuple[str, type[np.generic]]] = {
    "torch DoubleStorage": ("F64", np.float64),
    "torch FloatStorage": ("F32", np.float32),
    "torch HalfStorage": ("F16", np.float16),
    "torch BFloat16Storage": ("BF16", np.uint16),  # numpy has no bfloat16: the upper half of a float32
    "torch LongStorage": ("I64", np.int64),
    "torch IntStorage": ("I32", np.int32),
    "torch ShortStorage": ("I16", np.int16),
    "torch CharStorage": ("I8", np.int8),
    "torch ByteStorage": ("U8", np.uint8),
    "torch BoolStorage": ("BOOL", np.bool_),
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_DICT = "collections OrderedDict"
_MARK = object()


@dataclass(frozen=True)
class _Name:
    """A name that the pickle mentions, as text."""

    text: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    numbers: int


@dataclass(frozen=True)
class _View:
    """A tensor: a view of a storage, offset and strides in numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_tensors(file: Path) -> dict[str, TensorRef]:
    """Return the tensors of `file` by key, checked against the archive's sizes; no tensor is read yet.

    Raises:
        AdapterError: the file cannot be read, is truncated or damaged, or holds anything but a table of tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _tensors(archive, file)
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror}", hint="check the file's permissions") from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error) as error:
        raise AdapterError(
            f"{file} is truncated, damaged, or was saved by a torch older than 1.6: {error}", hint=_SAVE_AGAIN
        ) from error


def _tensors(archive: zipfile.ZipFile, file: Path) -> dict[str, TensorRef]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    tables = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(tables) != 1 or len(entries) != len(archive.infolist()):
        raise AdapterError(f"{file} is not what torch.save writes: {len(tables)} tables of tensors", hint=_AGAIN)
    root = tables[0].removesuffix("data.pkl")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
        raise AdapterError(f"{file} is not what torch.save writes: it is compressed or encrypted", hint=_AGAIN)
    if entries[tables[0]].file_size > MAX_TABLE_BYTES:
        raise AdapterError(f"{file} has a table of more than {MAX_TABLE_BYTES} bytes", hint=_AGAIN)
    if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
        raise AdapterError(f"{file} was saved on a machine of another byte order", hint=_SAVE_AGAIN)
    table = _Table(file).run(archive.read(tables[0]))
    if not table:
        raise AdapterError(f"{file} holds no tensor", hint="save the adapter again after training")
    return {key: _reference(key, view, entries, root, file) for key, view in table.items()}


class _Table:
    """Follows the instructions that build a dict of tensors."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> dict[str, _View]:
        """Return the tensors' views by key."""
        try:
            for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
                if opcode.name == "STOP":
                    break
                self._step(opcode.name, argument)
            (result,) = self.stack
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError) as error:
            raise AdapterError(f"{self.file} has a damaged table of tensors: {error}", hint=_AGAIN) from error
        if not isinstance(result, dict):
            raise self._refuse(f"holds a {type(result).__name__}")
        for key, value in result.items():
            if not isinstance(key, str) or not isinstance(value, _View):
                name = repr(key) if isinstance(key, str) else f"a {type(key).__name__}"
                raise self._refuse(f"holds a {type(value).__name__} at {name}")
        return result

    def _refuse(self, what: str) -> AdapterError:
        return AdapterError(
            f"{self.file} is a pickle that {what}; only a table of tensors is read, and nothing of it was run",
            hint=_SAVE_AGAIN,
        )

    def _step(self, name: str, argument: Any) -> None:
        step: Callable[[Any], None] | None = getattr(self, f"_on_{name.lower()}", None)
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self._make_tuple(_TUPLES[name])
        elif step is not None:
            step(argument)
        else:
            raise self._refuse(f"holds the instruction {name}")

    def _on_proto(self, version: int) -> None:
        if version != 2:
            raise self._refuse(f"is of protocol {version}, torch.save writes 2")

    def _on_global(self, name: str) -> None:
        if name not in (_TENSOR, _DICT) and name not in _STORAGES:
            raise self._refuse(f"names {name.replace(' ', '.')}")
        self.stack.append(_Name(name))

    def _on_mark(self, _: None) -> None:
        self.stack.append(_MARK)

    def _on_tuple(self, _: None) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _on_binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _on_long_binput = _on_binput

    def _on_binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _on_long_binget = _on_binget

    def _on_setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _on_setitems(self, _: None) -> None:
        self._set(self._since_mark())

    def _on_binpersid(self, _: None) -> None:
        word, kind, key, _device, numbers = self.stack.pop()
        if word != "storage" or not isinstance(kind, _Name) or kind.text not in _STORAGES or not isinstance(key, str):
            raise self._refuse("holds a storage of an unknown kind")
        self.stack.append(_Storage(kind.text, key, _count(numbers)))

    def _on_reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function == _Name(_DICT) and arguments == ():
            self.stack.append({})
        elif function == _Name(_TENSOR):
            storage, offset, shape, strides, *_rest = arguments
            if not isinstance(storage, _Storage) or len(shape) != len(strides):
                raise ValueError("a tensor without a storage")
            self.stack.append(_View(storage, _count(offset), tuple(map(_count, shape)), tuple(map(_count, strides))))
        else:
            raise self._refuse(f"calls {function.text if isinstance(function, _Name) else type(function).__name__}")

    def _make_tuple(self, length: int) -> None:
        values = tuple(self.stack[-length:])
        if len(values) != length or _MARK in values:
            raise ValueError("a tuple of values that are not there")
        del self.stack[-length:]
        self.stack.append(values)

    def _since_mark(self) -> list[Any]:
        at = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _set(self, pairs: list[Any]) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict) or len(pairs) % 2:
            raise ValueError("an entry without its table")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if key in table:
                raise ValueError("a key twice")
            table[key] = value


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"})
_EMPTY: Mapping[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError("no size where a size belongs")
    return value


def _reference(key: str, view: _View, entries: Mapping[str, zipfile.ZipInfo], root: str, file: Path) -> TensorRef:
    dtype, kind = _STORAGES[view.storage.kind]
    name = f"{root}data/{view.storage.key}"
    bytes_ = view.storage.numbers * np.dtype(kind).itemsize
    if name not in entries or entries[name].file_size != bytes_:
        held = entries[name].file_size if name in entries else "no"
        raise AdapterError(f"tensor {key!r} in {file} needs {bytes_} bytes, the file has {held}", hint=_AGAIN)
    size = math.prod(view.shape)
    last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True))
    # a view with a stride of 0 could be larger than all memory
    if size and (last >= view.storage.numbers or size > view.storage.numbers):
        raise AdapterError(f"tensor {key!r} in {file} reaches beyond its storage", hint=_AGAIN)
    read = partial(_read, file, key, name, view)
    return TensorRef(key=key, shape=view.shape, dtype=dtype, file=file, read=read)


def _read(file: Path, key: str, name: str, view: _View) -> Array:
    """Return the tensor as float32[shape], integers as saved; NaN and infinity are refused."""
    dtype, kind = _STORAGES[view.storage.kind]
    try:
        with zipfile.ZipFile(file) as archive:
            data = archive.read(name)  # checks the CRC
    except (OSError, KeyError, zipfile.BadZipFile, EOFError, struct.error) as error:
        raise AdapterError(f"tensor {key!r} in {file} is damaged: {error}", hint=_AGAIN) from error
    storage = np.frombuffer(data, kind)
    if storage.size != view.storage.numbers:
        raise AdapterError(f"{file} became shorter while it was read (tensor {key!r})", hint=_AGAIN)
    steps = tuple(stride * storage.itemsize for stride in view.strides)
    seen = np.lib.stride_tricks.as_strided(storage[view.offset :], view.shape, steps, writeable=False)
    values = np.ascontiguousarray(seen).reshape(view.shape)
    if dtype == "BF16":
        return check_finite((values.astype(np.uint32) << 16).view(np.float32), key, file)
    if dtype.startswith("F"):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused below
            return check_finite(values.astype(np.float32), key, file)
    return values
