"""Files that this device made from a bundle and can make again: each entry is a folder, whole or not there.

    CACHE/shared/KEY/...             the entry's files
    CACHE/shared/KEY/record.json     what it was made from, and the files' digests

KEY stands for what the entry was made from. Equal large files of two entries are stored once, as two names of one file.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgeadapt.errors import EdgeAdaptError, FileError
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

SCHEMA = "edgeadapt.shared/1"
RECORD_FILE = "record.json"
FOLDER_VARIABLE = "EDGEADAPT_CACHE_DIR"
LIMIT_VARIABLE = "EDGEADAPT_CACHE_MAX_BYTES"
DEFAULT_LIMIT_BYTES = 8 * 2**30

Make = Callable[[Path], Mapping[str, str] | None]

_MAX_RECORD_BYTES = 2**16
_WAIT_S = 300.0
"""For another process that writes an entry: seconds, minutes on a slow disk."""


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
    made_from: Mapping[str, str]
    files: Mapping[str, CachedFile]


def cache_folder() -> Path:
    """Return the folder for files that this device can make again: $EDGEADAPT_CACHE_DIR, else the user's cache."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "edgeadapt" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgeadapt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeadapt"


def cached_entry(made_from: Mapping[str, str], make: Make, *, needed_bytes: int) -> Path:
    """Return the folder of an entry; it is made when first needed, and again when it is damaged.

    Damage is found by a file's size and time, and by its digest where the time differs.

    Args:
        made_from: all that the files depend on.
        make: writes the entry's files into an empty folder that nobody sees yet; it may return their SHA-256 by name.
        needed_bytes: how much it will write at most.

    Raises:
        FileError: if the cache cannot be read or written, or may not hold so much.
        EdgeAdaptError: what `make` raises; nothing is left behind.
    """
    root = cache_folder() / "shared"
    entry = root / hashlib.sha256(canonical_json(made_from)).hexdigest()[:32]
    if not _is_sound(entry, made_from):
        with write_errors(root):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked_directory(root, wait_s=_WAIT_S):
            if not _is_sound(entry, made_from):  # another process may have made it while this one waited
                _write(entry, made_from, make, needed_bytes)
    with suppress(OSError):  # the order of use, for `_make_room`; a cache that is only read needs none
        os.utime(entry / RECORD_FILE)
    return entry


def _is_sound(entry: Path, made_from: Mapping[str, str]) -> bool:
    try:
        record = _read_record(entry)
        return dict(record.made_from) == dict(made_from) and all(
            _is_file(entry / name, file) for name, file in record.files.items()
        )
    except (FileError, OSError):
        return False


def _read_record(entry: Path) -> Record:
    data = parse_json(read_bytes(entry / RECORD_FILE, max_bytes=_MAX_RECORD_BYTES), str(entry), FileError)
    record = from_mapping(Record, data, str(entry), FileError)
    if record.schema != SCHEMA:
        raise FileError(f"{entry}: schema is {record.schema!r}", hint="remove it")
    return record


def _is_file(path: Path, expected: CachedFile) -> bool:
    status = path.lstat()
    if status.st_size != expected.size:
        return False
    return status.st_mtime_ns == expected.modified_ns or sha256_file(path) == expected.sha256


def _write(entry: Path, made_from: Mapping[str, str], make: Make, needed_bytes: int) -> None:
    """Write an entry, under the cache's lock."""
    if entry.exists():
        remove_tree(entry)
    _make_room(entry.parent, needed_bytes)
    require_free_space(entry.parent, needed_bytes)
    with staged_directory(entry, force=False) as folder:
        known = make(folder) or {}
        with write_errors(folder):
            files = {}
            for path in sorted(folder.iterdir()):
                digest = known.get(path.name) or sha256_file(path)
                _share(path, digest, entry.parent)
                status = path.stat()
                files[path.name] = CachedFile(status.st_size, digest, status.st_mtime_ns)
            (folder / RECORD_FILE).write_bytes(canonical_json(to_mapping(Record(SCHEMA, made_from, files))))


def _share(path: Path, digest: str, root: Path) -> None:
    """Replace a new file by another name of an equal one that is there already, so that its pages are shared."""
    for entry in _entries(root):
        with suppress(EdgeAdaptError, OSError):  # not ours, damaged, or on a disk without hard links: keep the new one
            for name, known in _read_record(entry).files.items():
                if known.sha256 == digest and _is_file(entry / name, known):
                    link = path.with_name(path.name + ".link")
                    os.link(entry / name, link)
                    link.replace(path)
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
    entries = sorted(_entries(root), key=lambda entry: (entry / RECORD_FILE).stat().st_mtime)
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


def _total_bytes(entries: list[Path]) -> int:
    """Return the bytes on disk; a file with two names counts once."""
    sizes: dict[tuple[int, int], int] = {}
    for path in (file for entry in entries for file in entry.iterdir()):
        status = path.stat()
        sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
