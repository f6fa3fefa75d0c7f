"""Profiles as files: JSON that docs/formats/profile-2.schema.json describes."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

from edgeadapt.errors import ProfileError
from edgeadapt.fields import from_mapping
from edgeadapt.files import canonical_json, parse_json, read_bytes, write_atomically
from edgeadapt.profiling.figures import SCHEMA, Profile

_MOST_BYTES = 1 << 28
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile; a reader never sees half of it.

    Raises:
        FileError: if the file cannot be written.
    """
    write_atomically(path, canonical_json(profile.to_json()))


def read_profile(path: Path | str) -> Profile:
    """Return the profile in a file.

    Raises:
        FileError: if it cannot be read.
        ProfileError: if it is no profile, or one of another version.
    """
    data = parse_json(read_bytes(Path(path), max_bytes=_MOST_BYTES), str(path), ProfileError)
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if schema != SCHEMA:
        raise ProfileError(
            f"{path}: it is no profile: its schema is {schema!r}, not {SCHEMA!r}",
            hint="give a file that `edgeadapt profile --output` wrote with this version",
        )
    return from_mapping(Profile, data, str(path), ProfileError)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a profile, made from the dataclasses."""
    defs: dict[str, Any] = {}
    top = _record(Profile, defs)
    top["properties"]["schema"] = {"const": SCHEMA}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SCHEMA,
        **top,
        "$defs": dict(sorted(defs.items())),
    }


def _record(cls: Any, defs: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    needed = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return {
        "description": inspect.cleandoc(cls.__doc__ or ""),
        "type": "object",
        "properties": {field.name: _schema(hints[field.name], defs) for field in fields},
        "required": needed,
        "additionalProperties": False,
    }


def _schema(hint: Any, defs: dict[str, Any]) -> dict[str, Any]:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        name = typing.cast(type, hint).__name__
        if name not in defs:
            defs[name] = _record(hint, defs)
        return {"$ref": f"#/$defs/{name}"}
    if origin is Literal:
        return {"enum": list(members)}
    if origin in (Union, types.UnionType):
        return _either([_schema(member, defs) for member in members])
    if origin is tuple:
        return _list(members, defs)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(members[1], defs)}
    return {"type": _TYPES[hint]}


def _either(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if all(list(schema) == ["type"] for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {"anyOf": schemas}


def _list(members: tuple[Any, ...], defs: dict[str, Any]) -> dict[str, Any]:
    if len(members) == 2 and members[1] is Ellipsis:
        return {"type": "array", "items": _schema(members[0], defs)}
    return {"type": "array", "prefixItems": [_schema(member, defs) for member in members], "items": False} | {
        "minItems": len(members)
    }
