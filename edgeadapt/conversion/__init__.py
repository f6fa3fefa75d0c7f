"""A trained adapter into a file that another program reads: proven against its base first, then written whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt import registry
from edgeadapt.adapters.inspect import default_head_size, task_of
from edgeadapt.addition import one_adapter
from edgeadapt.errors import AdapterError, FileError
from edgeadapt.files import write_atomically
from edgeadapt.pipeline.inputs import in_order_of, resolve_on
from edgeadapt.progress import SILENT, Progress

if TYPE_CHECKING:
    from edgeadapt.merging.base_model import BaseModel

FORMATS = "edgeadapt.conversion.formats"


@dataclass(frozen=True)
class Converted:
    """A file that was written, and what there is to know of it, JSON-able."""

    path: Path
    facts: Mapping[str, Any]


def convert_adapter(
    adapter: Path | str,
    base: BaseModel | Path | str,
    output: Path | str,
    *,
    to: str,
    dtype: str = "f32",
    revision: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Converted:
    """Write an adapter as a file of the format `to`, and return what was written.

    The adapter is read and proven complete against its base as for an export, so any layout and any kind can be given
    whose effect the format can hold; anything else is refused, and nothing is written.

    Args:
        adapter: the adapter's folder, holding one adapter.
        base: the base that it was trained on: a folder, a GGUF file, a hub id, or what `load_base_model` returned.
        output: the file to write.
        to: a file name in `edgeadapt/conversion/formats` ("gguf").
        dtype: what numbers are held in, one of the format's `DTYPES`.
        revision: the hub commit of the base.
        force: replace an existing file.
        progress: told of each stage.

    Raises:
        AdapterError: the adapter is damaged or does not fit the base, or the format cannot hold what it does.
        BaseModelError: the base cannot be loaded.
        FileError: the file exists, or cannot be written.
    """
    from edgeadapt.merging.load import load_base_model

    target, form = Path(output), registry.load(FORMATS, to, AdapterError)
    if dtype not in form.DTYPES:
        raise AdapterError(f"{to} files are not written in {dtype!r}", hint=f"known: {', '.join(form.DTYPES)}")
    _check_target(target, force=force)
    with progress.stage("read the adapter"):
        found = one_adapter(Path(adapter), None)
        for warning in found.warnings:
            progress.note(f"{found.name}: {warning}")
    with progress.stage("load base"):
        if isinstance(base, Path | str):
            base = load_base_model(base, task=task_of(found), num_labels=default_head_size(found), revision=revision)
        resolved = resolve_on(base, in_order_of(base, [found])[0])
    with progress.stage("write"):
        data, facts = form.encode(resolved, base, found.base, dtype)
        write_atomically(target, data)
    return Converted(target, {"adapter": found.name, "format": to, "dtype": dtype, "bytes": len(data), **facts})


def _check_target(target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise FileError(f"{target} is a folder", hint="give the name of the file to write")
    if os.path.lexists(target) and not force:
        raise FileError(f"{target} exists already", hint="choose another target, or replace it with --force")
