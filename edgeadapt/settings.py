"""Settings files: one TOML file per device in devices/ and per recipe in recipes/, data without code.

A file is named by its path, or, for those that ship with edgeadapt, by its file name without ".toml".
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeadapt.errors import RecipeError

_PACKAGE = Path(__file__).parent


def folder(kind: str) -> Path:
    """Return the folder of the shipped files of `kind` ("devices", "recipes").

    An installed package carries them in `_data`; in a checkout they lie beside the package.
    """
    installed = _PACKAGE / "_data" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def names(kind: str) -> tuple[str, ...]:
    """Return the names of the shipped files of `kind`, sorted."""
    found = tuple(sorted(path.stem for path in folder(kind).glob("*.toml")))
    if not found:
        raise RuntimeError(f"no {kind} in {folder(kind)}")
    return found


def find(kind: str, name: str | Path) -> Path:
    """Return the settings file that `name` means: a path if it ends in ".toml", else a shipped file's name.

    Raises:
        RecipeError: if there is no such file.
    """
    noun = kind.removesuffix("s")
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise RecipeError(f"there is no {noun} file {path}", hint="check the path")
        return path
    known = names(kind)
    if str(name) not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise RecipeError(
            f"unknown {noun} {str(name)!r}", hint=f"{guess}known: {', '.join(known)}; or give the path of a .toml file"
        )
    return folder(kind) / f"{name}.toml"


def read(path: Path) -> dict[str, Any]:
    """Return what a TOML file says.

    Raises:
        RecipeError: if the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}", hint="correct the file; see https://toml.io") from error
    except OSError as error:
        raise RecipeError(
            f"cannot read {path}: {error.strerror or error}", hint="check the path and its permissions"
        ) from error


def summary(path: Path) -> str:
    """Return a settings file's first comment line, "" if it does not start with one."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def to_toml(values: Mapping[str, str | int | float | bool | Sequence[str] | Mapping[str, str]], comment: str) -> str:
    """Return settings as TOML after a comment line; `read` gives the same values again."""
    lines = [f"# {' '.join(comment.split())}"]
    for key, value in values.items():
        if isinstance(value, str | bool | int):
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
        elif isinstance(value, float):
            lines.append(f"{key} = {value!r}")
        elif isinstance(value, Mapping):
            pairs = (f"{_text(name)} = {_text(item)}" for name, item in value.items())
            lines.append(f"{key} = {{ {', '.join(pairs)} }}")
        else:
            lines += [f"{key} = [", *(f"    {_text(item)}," for item in value), "]"]
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    """Return a string as TOML's basic strings are written, which are JSON's."""
    return json.dumps(value, ensure_ascii=False)
