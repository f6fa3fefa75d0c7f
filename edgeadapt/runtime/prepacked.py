"""Weights and adapters as files of this device's cache that all sessions map: the same pages, whoever uses them.

ONNX Runtime copies each weight into the layout that its kernels want when a session opens: as much memory again, for
every session, that no other one can use. It can write that layout into a file and map it later. Such files fit one
version of ONNX Runtime on one kind of processor, so they are made here, on the device, and never travel in a bundle.
The plain and the slots graph get the same data file, byte for byte: the cache stores it once.

Adapters are bound as float32: twice or four times their file. As a mapped file they cost no memory of a process.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.bundle import Bundle
from edgeadapt.bundle.rules import RESIDUAL_FILE
from edgeadapt.errors import BundleError, FileError, SessionError
from edgeadapt.files import canonical_json, parse_json, read_bytes, sha256_file, write_errors
from edgeadapt.runtime.device_cache import cached_entry
from edgeadapt.runtime.ort import save_prepacked, version

SHARE_VARIABLE = "EDGEADAPT_SHARE_WEIGHTS"
GRAPH_FILE, WEIGHTS_FILE = "graph.onnx", "weights.bin"
INDEX_FILE, TENSORS_FILE = "index.json", "tensors.bin"

_GROWTH = 3
"""The files of one graph are at most so many times its weights (measured: 2.3 for int8, 2.4 for int4)."""
_ADAPTER_GROWTH = 16
"""Float32 is four times int8, and joined modules have blocks of zeros: at most so many times the adapter's file."""
_ALIGNMENT_BYTES = 64
_MAX_INDEX_BYTES = 2**26


def shares_weights(wanted: bool | None, provider: str) -> bool:
    """Return whether weights are to be shared: as the caller says, else as the environment does.

    Raises:
        SessionError: if they are to be shared on a GPU, or the environment's word is none.
    """
    asked = os.environ.get(SHARE_VARIABLE, "0") if wanted is None else str(int(wanted))
    if asked not in ("0", "1", ""):
        raise SessionError(f"{SHARE_VARIABLE} is {asked!r}", hint="set it to 1 or 0")
    if asked == "1" and provider != "cpu":
        if wanted is None:  # the variable speaks of all sessions, this one has its weights on the GPU
            return False
        raise SessionError(
            f"share_weights is for the CPU, and the provider is {provider!r}", hint="leave share_weights out"
        )
    return asked == "1"


def prepacked_graph(bundle: Bundle, graph: str) -> Path:
    """Return a graph of a bundle as a file whose weights are shared with other sessions; it is made when first needed.

    Making it opens the graph once and writes about 2.3 times the weights' size.

    Args:
        bundle: the bundle.
        graph: the graph's path in the bundle.

    Raises:
        BundleError: if the bundle's own files are damaged.
        FileError: if the cache cannot be read or written, or is too small.
        SessionError: if ONNX Runtime cannot open the graph.
    """
    weights = [path for path, record in bundle.manifest.files.items() if record.role == "weights"]
    source = bundle.file(graph)

    def make(folder: Path) -> None:
        for path in (graph, *weights):
            if sha256_file(bundle.file(path)) != bundle.manifest.files[path].sha256:
                raise BundleError(
                    f"{bundle.file(path)} is damaged: its SHA-256 is not the manifest's",
                    hint="export the bundle or copy it again",
                )
        save_prepacked(source, folder / GRAPH_FILE, WEIGHTS_FILE)

    made_from = {
        "graph": bundle.manifest.files[graph].sha256,
        "weights": " ".join(sorted(bundle.manifest.files[path].sha256 for path in weights)),
        "onnxruntime": version(),
        "processor": _processor(),
    }
    needed = _GROWTH * sum(bundle.manifest.files[path].size for path in weights)
    return cached_entry(made_from, make, needed_bytes=needed) / GRAPH_FILE


def mapped_adapter(bundle: Bundle, name: str) -> dict[str, NDArray[np.float32]]:
    """Return `bundle.graph_tensors(name)` as views of a mapped file, which is made when first needed.

    Raises:
        BundleError: if there is no such adapter, or its file is damaged or sets something that it may not.
        FileError: if the cache cannot be read or written, or is too small.
    """
    bundle.adapter_record(name)
    files = bundle.manifest.files
    file = files[f"adapters/{name}/adapter.onnx_adapter"]
    made_from = {
        "adapter": file.sha256,
        "residual": files[RESIDUAL_FILE].sha256 if RESIDUAL_FILE in files else "",
        "slots": " ".join(files[graph.slots].sha256 for graph in _graphs(bundle) if graph.slots),
    }

    def make(folder: Path) -> None:
        _write_tensors(folder, bundle.graph_tensors(name))

    return _map_tensors(cached_entry(made_from, make, needed_bytes=_ADAPTER_GROWTH * file.size))


def _graphs(bundle: Bundle) -> list[Any]:
    return [graph for _, graph in sorted(bundle.manifest.graphs.items())]


def _write_tensors(folder: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    index: dict[str, list[int]] = {}
    with write_errors(folder), (folder / TENSORS_FILE).open("wb") as file:
        for name, value in tensors.items():
            index[name] = [file.tell(), *value.shape]
            file.write(value.tobytes())
            file.write(bytes(-file.tell() % _ALIGNMENT_BYTES))
        (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


def _map_tensors(entry: Path) -> dict[str, NDArray[np.float32]]:
    index = parse_json(read_bytes(entry / INDEX_FILE, max_bytes=_MAX_INDEX_BYTES), str(entry), FileError)
    with (entry / TENSORS_FILE).open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: np.frombuffer(data, np.float32, math.prod(shape), start).reshape(shape)
        for name, (start, *shape) in index.items()
    }


def _processor() -> str:
    """Return what decides which kernels run: the architecture, and on Linux the model and its instruction sets."""
    names = {"model name", "flags", "Features", "CPU part"}
    with suppress(OSError):
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
        found = sorted({f"{key.strip()}:{value.strip()}" for key, _, value in lines if key.strip() in names})
        if found:
            return f"{platform.machine()} {hashlib.sha256(canonical_json(found)).hexdigest()[:16]}"
    return f"{platform.machine()} {platform.processor()}"
