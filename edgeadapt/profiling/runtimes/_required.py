"""A bundle's graphs for runtimes that know no optional inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgeadapt.bundle import Bundle
from edgeadapt.profiling.required_inputs import ReadExternal, require_inputs
from edgeadapt.profiling.runtimes.onnxruntime import graphs_of


def required_graphs(bundle: Bundle, folder: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Put a bundle's only graph, in both forms, and its weights below `folder/model`, every input a required one.

    Returns:
        Files by "plain" and "slots"; the values of the inputs that were optional.

    Raises:
        ProfileError: if the bundle has several graphs.
        BundleError: if its files are damaged.
    """
    files = graphs_of(bundle, folder)
    (graph,) = bundle.manifest.graphs.values()
    defaults: dict[str, NDArray[Any]] = {}
    for form, name in (("plain", graph.plain), ("slots", graph.slots)):
        if name is None:
            continue
        model, found = require_inputs(bundle.read(name), _reader(bundle.file(name).parent))
        target = folder / files[form]
        target.unlink()  # it may be a link to the bundle's own file
        target.write_bytes(model)
        defaults |= found
    return files, defaults


def _reader(folder: Path) -> ReadExternal:
    def read(name: str, offset: int, length: int | None) -> bytes:
        with (folder / Path(name).name).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    return read
