"""The stamp of the base that an adapter was trained on: `base_fingerprint.json` beside the adapter.

A JSON object of exactly: `schema` "edgeadapt.base/1"; `name` and `revision`, text or null; `quantization` "nf4" or
null; `parameters`, the SHA-256 (hex) of a parameter's float32 bytes by the parameter's name in the base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeadapt.adapters.adapter import BaseReference, TargetModule
from edgeadapt.errors import AdapterError

FILE_NAME = "base_fingerprint.json"
SCHEMA = "edgeadapt.base/1"
_FIELDS = {"schema", "name", "revision", "quantization", "parameters"}
_ROUNDED = ("linear", "conv1d")  # what NF4 rounds
_STAMP_AGAIN = "delete it, or write it again with edgeadapt.stamp_base"


def read_fingerprint(file: Path) -> BaseReference:
    """Return what `file` says of the base.

    Raises:
        AdapterError: the file is not of the form in this module's docstring.
    """
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not JSON: {error}", hint=_STAMP_AGAIN) from error
    _check(data, file)
    return BaseReference(
        name=data["name"],
        revision=data["revision"],
        fingerprint=dict(data["parameters"]),
        quantization=data["quantization"],
    )


def find_fingerprint(folder: Path, root: Path, name: str | None, revision: str | None) -> BaseReference:
    """Return what the stamp in `folder`, else that in `root`, says of the base; without one only what is given."""
    stamp = next((file for file in (folder / FILE_NAME, root / FILE_NAME) if file.is_file()), None)
    if stamp is None:
        return BaseReference(name, revision)
    base = read_fingerprint(stamp)
    return BaseReference(base.name or name, base.revision or revision, base.fingerprint, base.quantization)


def _check(data: Any, file: Path) -> None:
    if not isinstance(data, dict) or set(data) != _FIELDS:
        raise AdapterError(f"{file} must hold exactly {', '.join(sorted(_FIELDS))}", hint=_STAMP_AGAIN)
    if data["schema"] != SCHEMA:
        raise AdapterError(f"{file} has schema {data['schema']!r}, not {SCHEMA!r}", hint="update edgeadapt")
    for name in ("name", "revision"):
        if not isinstance(data[name], str | None):
            raise AdapterError(f"{file}: {name} is {data[name]!r}, not text or null", hint=_STAMP_AGAIN)
    if data["quantization"] not in (None, "nf4"):
        raise AdapterError(f"{file}: quantization is {data['quantization']!r}, not 'nf4' or null", hint=_STAMP_AGAIN)
    _check_digests(data["parameters"], file)


def _check_digests(parameters: Any, file: Path) -> None:
    if not isinstance(parameters, dict) or not parameters:
        raise AdapterError(f"{file}: parameters is not a table of digests", hint=_STAMP_AGAIN)
    for name, digest in parameters.items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise AdapterError(f"{file}: parameters[{name!r}] is {digest!r}, not a SHA-256", hint=_STAMP_AGAIN)


def check_digest(base: BaseReference, names: tuple[str, ...], module: TargetModule, base_name: str | None) -> None:
    """Check that the base's weight at `module` is the one that the adapter was trained on, if the stamp names it.

    `names` are the module's paths in the stamp to look for: in the base, in the adapter's file. The stamp of a
    quantized base holds the digests of rounded weights, which say nothing of the weights that they were rounded from:
    see `check_unrounded`.

    Raises:
        AdapterError: the digests differ.
    """
    if base.quantization is not None and module.type in _ROUNDED:
        return
    digests = base.fingerprint or {}
    stamped = next((digests[f"{name}.weight"] for name in names if f"{name}.weight" in digests), None)
    if stamped is not None and stamped != module.digest:
        raise AdapterError(
            f"the base is not the one that the adapter was trained on: tensor '{module.path}.weight' has digest "
            f"{module.digest[:12]} in {base_label(base_name)} and {stamped[:12]} in {trained_on(base)}",
            hint="give the base (and revision) that the adapter was trained on",
        )


def check_unrounded(
    base: BaseReference, names: Mapping[str, str], modules: Mapping[str, TargetModule], base_name: str | None
) -> None:
    """Check a quantized base by what quantization leaves alone: embeddings, norms and convolutions.

    So an adapter that was trained on a base in NF4 is known on that base in NF4 and in full precision alike.

    Args:
        base: what the adapter says of its base.
        names: the adapter's name of each of the base's modules, by path.
        modules: the base's.
        base_name: for messages.

    Raises:
        AdapterError: a digest differs.
    """
    if base.quantization is None:
        return
    for path, name in names.items():
        check_digest(base, (path, name), modules[path], base_name)


def base_label(base_name: str | None) -> str:
    """Return a name for the base at hand, for error messages."""
    return f"base {base_name!r}" if base_name else "the given base"


def trained_on(base: BaseReference) -> str:
    """Return a name for the base that the adapter was trained on, for error messages."""
    if base.name is None:
        return "a base whose name was not saved"
    revision = f" at revision {base.revision}" if base.revision else ""
    quantization = f", quantized to {base.quantization}" if base.quantization else ""
    return f"base {base.name!r}{revision}{quantization}"
