"""Weights in the kernels' own layout, kept on the device so that sessions share them as pages of one file.

ONNX Runtime copies each weight into the layout that its kernels want when a session opens: as much memory again, for
every session, that no other one can use. It can write that layout into a file and map it later. Such files fit one
version of ONNX Runtime on one kind of processor, so they are made here, on the device, and never travel in a bundle.

    CACHE/prepacked/KEY/graph.onnx     the graph after ONNX Runtime's optimizations
    CACHE/prepacked/KEY/weights.bin    its weights as they were and as the kernels want them
    CACHE/prepacked/KEY/record.json    what it was made from, and the files' digests

KEY stands for the graph's and the weights' digests in the bundle, ONNX Runtime's version and the processor. The plain
and the slots graph get the same weights.bin, byte for byte: it is stored once, as two names of one file.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeadapt.bundle.bundle import Bundle
from edgeadapt.errors import BundleError, EdgeAdaptError, FileError, SessionError
from edgeadapt.fields import from_mapping, to_mapping
from edgeadapt.files import (
    canonical_json,
    locked_directory,
    parse_json,
    read_bytes,
    remove_tree,
    require_free_space,
    sha256_file,
    staged_directory,
    write_errors,
)
from edgeadapt.runtime.ort import save_prepacked, version

SCHEMA = "edgeadapt.prepacked/1"
GRAPH_FILE, WEIGHTS_FILE, RECORD_FILE = "graph.onnx", "weights.bin", "record.json"
SHARE_VARIABLE = "EDGEADAPT_SHARE_WEIGHTS"
FOLDER_VARIABLE = "EDGEADAPT_CACHE_DIR"
LIMIT_VARIABLE = "EDGEADAPT_CACHE_MAX_BYTES"
DEFAULT_LIMIT_BYTES = 8 * 2**30

_MAX_RECORD_BYTES = 2**16
_GROWTH = 3
"""The files of one graph are at most so many times its weights (measured: 2.3 for int8, 2.4 for int4)."""
_WAIT_S = 300.0
"""For another process that writes the same files: seconds, minutes on a slow disk."""


@dataclass(frozen=True)
class CachedFile:
    """One file as it was when it was written; `modified_ns` tells cheaply that nobody touched it since."""

    size: int
    sha256: str
    modified_ns: int


@dataclass(frozen=True)
class Record:
    """The content of `record.json`: `made_from` names what the key stands for, `files` are by name."""

    schema: str
    made_from: dict[str, str]
    files: dict[str, CachedFile]


def prepacked_graph(bundle: Bundle, graph: str) -> Path:
    """Return a graph of a bundle as a file whose weights are shared with other sessions; it is made when first needed.

    Making it opens the graph once and writes about 2.3 times the weights' size. A file that is damaged is made again.

    Args:
        bundle: the bundle.
        graph: the graph's path in the bundle.

    Raises:
        BundleError: if the bundle's own files are damaged.
        FileError: if the cache cannot be read or written, or is too small.
        SessionError: if ONNX Runtime cannot open the graph.
    """
    made_from = _made_from(bundle, graph)
    key = hashlib.sha256(canonical_json(made_from)).hexdigest()[:32]
    root = cache_folder() / "prepacked"
    entry = root / key
    if not _is_sound(entry, made_from):
        with write_errors(root):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked_directory(root, wait_s=_WAIT_S):
            if not _is_sound(entry, made_from):  # another process may have made it while this one waited
                _make(bundle, graph, entry, made_from)
    with suppress(OSError):  # the order of use, for `_make_room`; a cache that is only read needs none
        os.utime(entry / RECORD_FILE)
    return entry / GRAPH_FILE


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


def cache_folder() -> Path:
    """Return the folder for files that this device can make again: $EDGEADAPT_CACHE_DIR, else the user's cache."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "edgeadapt" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgeadapt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeadapt"


def _made_from(bundle: Bundle, graph: str) -> dict[str, str]:
    files = bundle.manifest.files
    weights = sorted(record.sha256 for record in files.values() if record.role == "weights")
    bundle.file(graph)  # refuses what the manifest does not list
    return {
        "graph": files[graph].sha256,
        "weights": " ".join(weights),
        "onnxruntime": version(),
        "processor": _processor(),
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


def _is_sound(entry: Path, made_from: dict[str, str]) -> bool:
    """Whether an entry's files are as they were written: by size and time, or by digest where the time changed."""
    try:
        data = parse_json(read_bytes(entry / RECORD_FILE, max_bytes=_MAX_RECORD_BYTES), str(entry), FileError)
        record = from_mapping(Record, data, str(entry), FileError)
        return (
            record.schema == SCHEMA
            and record.made_from == made_from
            and set(record.files) == {GRAPH_FILE, WEIGHTS_FILE}
            and all(_is_file(entry / name, file) for name, file in record.files.items())
        )
    except (FileError, OSError):
        return False


def _is_file(path: Path, expected: CachedFile) -> bool:
    status = path.lstat()
    if status.st_size != expected.size:
        return False
    return status.st_mtime_ns == expected.modified_ns or sha256_file(path) == expected.sha256


def _make(bundle: Bundle, graph: str, entry: Path, made_from: dict[str, str]) -> None:
    """Write an entry, under the cache's lock."""
    for path, record in bundle.manifest.files.items():
        if (path == graph or record.role == "weights") and sha256_file(bundle.file(path)) != record.sha256:
            raise BundleError(
                f"{bundle.file(path)} is damaged: its SHA-256 is not the manifest's",
                hint="export the bundle or copy it again",
            )
    weights_bytes = sum(record.size for record in bundle.manifest.files.values() if record.role == "weights")
    if entry.exists():
        remove_tree(entry)
    _make_room(entry.parent, _GROWTH * weights_bytes)
    require_free_space(entry.parent, _GROWTH * weights_bytes)
    with staged_directory(entry, force=False) as folder:
        save_prepacked(bundle.file(graph), folder / GRAPH_FILE, WEIGHTS_FILE)
        with write_errors(folder):
            (folder / WEIGHTS_FILE).touch()  # a graph without weights of its own has none
            digest = sha256_file(folder / WEIGHTS_FILE)
            _share(folder / WEIGHTS_FILE, digest, entry.parent)
            files = {
                GRAPH_FILE: _cached(folder / GRAPH_FILE, sha256_file(folder / GRAPH_FILE)),
                WEIGHTS_FILE: _cached(folder / WEIGHTS_FILE, digest),
            }
            (folder / RECORD_FILE).write_bytes(canonical_json(to_mapping(Record(SCHEMA, made_from, files))))


def _cached(path: Path, digest: str) -> CachedFile:
    status = path.stat()
    return CachedFile(status.st_size, digest, status.st_mtime_ns)


def _share(weights: Path, digest: str, root: Path) -> None:
    """Replace a new file by another name of an equal one that is there already, so that its pages are shared."""
    for entry in _entries(root):
        with suppress(EdgeAdaptError, OSError):  # not ours, damaged, or on a disk without hard links: keep the new one
            data = parse_json(read_bytes(entry / RECORD_FILE, max_bytes=_MAX_RECORD_BYTES), str(entry), FileError)
            known = from_mapping(Record, data, str(entry), FileError).files[WEIGHTS_FILE]
            if known.sha256 == digest and _is_file(entry / WEIGHTS_FILE, known):
                link = weights.with_suffix(".link")
                os.link(entry / WEIGHTS_FILE, link)
                link.replace(weights)
                return


def _make_room(root: Path, needed_bytes: int) -> None:
    """Remove the entries that were not used for longest until `needed_bytes` fit under the limit.

    Sessions that are open keep what they mapped, where the system lets a file go that is in use.

    Raises:
        FileError: if the limit is smaller than what is needed.
    """
    limit = _limit_bytes()
    if needed_bytes > limit:
        raise FileError(
            f"{root} may hold {limit} bytes, and {needed_bytes} are needed", hint=f"set {LIMIT_VARIABLE} to more"
        )
    entries = sorted(_entries(root), key=_last_used)
    while entries and _total_bytes(entries) + needed_bytes > limit:
        remove_tree(entries.pop(0))


def _limit_bytes() -> int:
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return DEFAULT_LIMIT_BYTES
    if not text.isdecimal():
        raise FileError(f"{LIMIT_VARIABLE} is {text!r}", hint="give a whole number of bytes such as 4000000000")
    return int(text)


def _entries(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if not path.name.startswith(".") and (path / RECORD_FILE).is_file()]


def _last_used(entry: Path) -> float:
    return (entry / RECORD_FILE).stat().st_mtime


def _total_bytes(entries: list[Path]) -> int:
    """Return the bytes on disk; a file with two names counts once."""
    sizes: dict[Any, int] = {}
    for path in (file for entry in entries for file in entry.iterdir()):
        status = path.stat()
        sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
