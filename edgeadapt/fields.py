"""Mappings (parsed TOML or JSON) to frozen dataclasses and back, strictly: no field is guessed, ignored or coerced.

A dataclass's type hints are the schema: str, int, float, bool, Path, Literal, Any, X | None and other unions,
tuple[X, ...], tuple[X, Y], Mapping[str, X] and nested dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from edgeadapt.errors import EdgeAdaptError

T = TypeVar("T")

_NOUNS: dict[Any, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    Path: "a path (a string)",
    type(None): "null",
    Any: "anything",
}


def from_mapping(cls: type[T], data: Any, where: str, error: type[EdgeAdaptError]) -> T:
    """Return an instance of the dataclass `cls` that holds exactly what `data` says.

    An integer is taken for a float, nothing else is converted. Fields without a default must be there; fields that
    `cls` does not have, and NaN or infinite numbers, are refused. A ValueError from `__post_init__` counts as a
    wrong value.

    Args:
        cls: a dataclass.
        data: a mapping with string keys.
        where: what `data` is, for messages ("recipes/smol.toml").
        error: the class of error to raise.

    Raises:
        EdgeAdaptError: of class `error`; the message names `where`, the field's full path and the value.
    """
    result = _Reader(where, error).dataclass(cls, data, "")
    return typing.cast(T, result)


def to_mapping(obj: Any, *, skip_none: bool = False) -> dict[str, Any]:
    """Return the dataclass `obj` as plain dicts, lists, strings and numbers: the inverse of `from_mapping`.

    Args:
        obj: a dataclass instance.
        skip_none: leave out fields that are None (TOML has no null).

    Raises:
        TypeError: if a value is none of the types that `from_mapping` knows.
    """
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"{obj!r} is not a dataclass instance")
    result = _plain(obj, skip_none)
    return typing.cast(dict[str, Any], result)


@dataclass(frozen=True)
class _Reader:
    where: str
    error: type[EdgeAdaptError]

    def dataclass(self, cls: Any, data: Any, path: str) -> Any:
        if not isinstance(data, Mapping):
            raise self.mismatch(path, "a table of fields", data)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for key in data:
            if key not in fields:
                raise self.unknown(key, tuple(fields), path)
        hints = _hints(cls)
        values = {}
        for name, field in fields.items():
            if name in data:
                values[name] = self.value(hints[name], data[name], _join(path, name))
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise self.fail(f"field {_join(path, name)} is missing", f"add it: {_noun(hints[name])}")
        try:
            return cls(**values)
        except ValueError as cause:
            raise self.fail(f"{path}: {cause}" if path else str(cause), "correct the value") from cause

    def value(self, hint: Any, value: Any, path: str) -> Any:
        origin = typing.get_origin(hint)
        if dataclasses.is_dataclass(hint):
            return self.dataclass(hint, value, path)
        if origin in (Union, types.UnionType):
            return self.union(hint, value, path)
        if origin is Literal:
            return self.literal(hint, value, path)
        if origin is tuple:
            return self.sequence(hint, value, path)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self.mapping(hint, value, path)
        return self.scalar(hint, value, path)

    def scalar(self, hint: Any, value: Any, path: str) -> Any:
        if hint is Any:
            return value
        if hint is float and type(value) in (int, float):
            if not math.isfinite(value):
                raise self.mismatch(path, "a finite number", value)
            return float(value)
        if hint is Path and type(value) is str:
            return Path(value)
        if hint in (str, int, bool, type(None)) and type(value) is hint:
            return value
        if hint not in _NOUNS:
            raise TypeError(f"{self.where}: {path}: fields of type {hint!r} are not supported")
        raise self.mismatch(path, _NOUNS[hint], value)

    def union(self, hint: Any, value: Any, path: str) -> Any:
        members = typing.get_args(hint)
        if value is None and type(None) in members:
            return None
        members = tuple(member for member in members if member is not type(None))
        if len(members) == 1:  # X | None: the error of X is the precise one
            return self.value(members[0], value, path)
        for member in members:
            try:
                return self.value(member, value, path)
            except self.error:
                continue
        raise self.mismatch(path, _noun(hint), value)

    def literal(self, hint: Any, value: Any, path: str) -> Any:
        allowed = typing.get_args(hint)
        for item in allowed:
            if type(item) is type(value) and item == value:
                return value
        raise self.mismatch(path, _noun(hint), value, _suggestion(value, [a for a in allowed if isinstance(a, str)]))

    def sequence(self, hint: Any, value: Any, path: str) -> Any:
        members = typing.get_args(hint)
        if not isinstance(value, list | tuple):
            raise self.mismatch(path, "a list", value)
        if len(members) == 2 and members[1] is Ellipsis:
            members = (members[0],) * len(value)
        if len(members) != len(value):
            raise self.fail(f"field {path} must have {len(members)} items, got {len(value)}", "correct the list")
        return tuple(
            self.value(member, item, f"{path}[{index}]")
            for index, (member, item) in enumerate(zip(members, value, strict=True))
        )

    def mapping(self, hint: Any, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self.mismatch(path, "a table", value)
        key_hint, value_hint = typing.get_args(hint)
        result = {}
        for key, item in value.items():
            inner = _join(path, key)
            result[self.value(key_hint, key, inner)] = self.value(value_hint, item, inner)
        return result

    def unknown(self, key: Any, known: Sequence[str], path: str) -> EdgeAdaptError:
        names = ", ".join(known)
        return self.fail(f"unknown field {_join(path, key)}", f"{_suggestion(key, known)}known fields: {names}")

    def mismatch(self, path: str, expected: str, value: Any, suggestion: str = "") -> EdgeAdaptError:
        subject = f"field {path}" if path else "it"
        return self.fail(f"{subject} must be {expected}, got {_show(value)}", f"{suggestion}correct the value")

    def fail(self, message: str, hint: str) -> EdgeAdaptError:
        return self.error(f"{self.where}: {message}", hint=hint)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Return a dataclass's types by field; a manifest holds hundreds of instances."""
    return typing.get_type_hints(cls)


def _join(path: str, name: Any) -> str:
    text = str(name)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", text):
        return f"{path}[{_cut(repr(text))}]"
    return f"{path}.{text}" if path else text


def _suggestion(value: Any, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _noun(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(item) for item in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_noun(member) for member in typing.get_args(hint))
    if origin is tuple:
        return "a list"
    if hint in _NOUNS:
        return _NOUNS[hint]
    return "a table"


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the string {_cut(repr(value))}"
    if isinstance(value, int | float):
        return f"the number {_cut(repr(value))}"
    if isinstance(value, Mapping):
        return "a table"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(value: Any, skip_none: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init)
        return {name: _plain(item, skip_none) for name, item in items if not (skip_none and item is None)}
    if isinstance(value, Mapping):
        return {_key(key): _plain(item, skip_none) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, skip_none) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if type(value).__module__ == "numpy" and value.ndim == 0:  # a scalar; numpy is not imported for the check
        return value.item()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be written as a field")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"the key {key!r} is not a string")
    return key
