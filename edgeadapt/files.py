"""Files that are whole or not there: staged folders, atomic writes, digests, canonical JSON."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from edgeadapt.errors import EdgeAdaptError, FileError

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".lock"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "os error 28", "os error 27")


@contextmanager
def staged_directory(target: Path, *, force: bool, replaces: str | None = "manifest.json") -> Iterator[Path]:
    """Yield a new empty folder beside `target` that becomes `target` when the block ends without an exception.

    Any exception, `KeyboardInterrupt` too, removes the folder and leaves an old target as it was. What is staged is
    fsynced before the rename; an old target is exchanged for the new one in one step where the system can do that,
    and removed only afterwards. Folders that a killed process left behind for the same target are removed first.

    Args:
        target: the folder to make.
        force: replace an existing target. Only an empty folder, or one that holds the file `replaces`, is replaced:
            `--force` with a mistyped path must not cost someone a home folder.
        replaces: the file that marks a folder as one of ours; None to replace only an empty one.

    Raises:
        FileError: if the target exists and `force` is false, is not such a folder, or cannot be written.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a symlinked target
    _check_target(target, force, replaces)
    made = _make_parents(target.parent)
    _remove_stale(target)
    staging = target.parent / f".{target.name}.tmp-{secrets.token_hex(4)}"
    lock: int | None = None
    try:
        with write_errors(target):
            staging.mkdir()
            lock = _flock(staging)
        yield staging
        _commit(staging, target, force, replaces)
    except BaseException as error:
        remove_tree(staging)
        for folder in made:
            _remove_if_empty(folder)
        if _is_full(error):
            _raise_full(target, error)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`: a reader sees the old bytes or the new ones, also after a crash.

    Raises:
        FileError: if the file cannot be written; the old one is then intact.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.tmp-{secrets.token_hex(4)}"
    with write_errors(path):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def check_writable(path: Path) -> None:
    """Check that `write_atomically` could write `path` now, before long work whose result it is for.

    Raises:
        FileError: if not.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder", hint="give the name of a file")
    temporary = path.parent / f".{path.name}.tmp-{secrets.token_hex(4)}"
    with write_errors(path):
        temporary.touch(exist_ok=False)
        temporary.unlink()


@contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turn an operating system's refusal inside the block into a `FileError` that names `target`."""
    try:
        yield
    except OSError as error:
        if _is_full(error):
            _raise_full(target, error)
        raise FileError(f"cannot write {target}: {_reason(error)}", hint=_write_hint(target.parent)) from error


@contextmanager
def locked_directory(folder: Path, *, wait_s: float) -> Iterator[None]:
    """Keep other processes from changing `folder` while the block runs; readers are not held up.

    The folder itself is locked, so no file is left behind and a killed process frees it. Where the system cannot do
    that (Windows, some network disks) a file `.lock` stands for the lock.

    Raises:
        FileError: if another process still holds the lock after `wait_s` seconds, or the folder is gone.
    """
    deadline = time.monotonic() + wait_s
    while (release := _try_lock(folder)) is None:
        if time.monotonic() >= deadline:
            raise FileError(
                f"another process is changing {folder}",
                hint=f"wait until it is done; if none runs, remove {folder / LOCK_FILE}",
            )
        time.sleep(0.05)
    try:
        yield
    finally:
        release()


def read_bytes(path: Path, *, max_bytes: int | None = None) -> bytes:
    """Return the bytes of a file.

    Raises:
        FileError: if it is missing, not a file, not readable, or larger than `max_bytes`.
    """
    try:
        if max_bytes is not None and (size := path.stat().st_size) > max_bytes:
            raise FileError(
                f"{path} has {size} bytes, at most {max_bytes} are allowed", hint="check that it is the right file"
            )
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {path}: {_reason(error)}", hint="check the path and its permissions") from error


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits, read in pieces.

    Raises:
        FileError: if the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"cannot read {path}: {_reason(error)}", hint="check the path and its permissions") from error


def canonical_json(obj: Any) -> bytes:
    """Return `obj` as JSON with one spelling: sorted keys, UTF-8, two spaces of indent, a newline at the end.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON cannot hold.
    """
    text = json.dumps(obj, sort_keys=True, ensure_ascii=False, indent=2, allow_nan=False, default=_plain)
    return (text + "\n").encode("utf-8")


def parse_json(data: bytes, where: str, error: type[EdgeAdaptError]) -> Any:
    """Return parsed JSON; duplicate keys, NaN and bytes that are not UTF-8 are refused.

    Raises:
        EdgeAdaptError: of class `error`, naming `where`.
    """

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            keys = [key for key, _ in items]
            raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
        return result

    try:
        return json.loads(data.decode("utf-8"), parse_constant=constant, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: not valid JSON: {cause}", hint="the file is damaged; make it anew") from cause


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse early if the disk that holds `folder` (or will hold it) has less than `needed_bytes` free.

    Raises:
        FileError: naming the folder and both figures.
    """
    existing = next((p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists()), Path("/"))
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise FileError(f"cannot look at {existing}: {_reason(error)}", hint="check the path") from error
    if free < needed_bytes:
        raise FileError(
            f"{folder} needs {needed_bytes} bytes, but only {free} are free on its disk",
            hint="free some space or choose a folder on another disk",
        )


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself, to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if not path.is_symlink():
                descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power cut."""
    if sys.platform == "win32":  # folders cannot be opened there; NTFS journals renames
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_target(target: Path, force: bool, replaces: str | None) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise FileError(f"{target} exists already", hint="choose another target, or replace it with --force")
    if target.is_symlink() or not target.is_dir():
        noun = "a symbolic link" if target.is_symlink() else "a file"
        raise FileError(f"{target} is {noun}, not a folder", hint="remove it yourself or choose another target")
    try:
        entries = os.listdir(target)  # noqa: PTH208 - names only
    except OSError as error:
        raise FileError(f"cannot look into {target}: {_reason(error)}", hint=_write_hint(target)) from error
    if entries and replaces not in entries:
        why = "is not empty" if replaces is None else f"holds no {replaces}, so it was not made by edgeadapt"
        raise FileError(
            f"{target} is not replaced: it {why}",
            hint="choose another target, or remove the folder yourself",
        )


def _make_parents(parent: Path) -> list[Path]:
    """Make the missing folders up to `parent`; return those made, deepest first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.insert(0, folder)
    except OSError as error:
        for folder in made:
            _remove_if_empty(folder)
        raise FileError(f"cannot make the folder {parent}: {_reason(error)}", hint=_write_hint(parent)) from error
    return made


def _commit(staging: Path, target: Path, force: bool, replaces: str | None) -> None:
    sync_tree(staging)
    _check_target(target, force, replaces)  # again: it may have appeared meanwhile
    with write_errors(target):
        if not os.path.lexists(target):
            staging.rename(target)
        else:
            with locked_directory(target, wait_s=0):
                if not _exchange(staging, target):
                    _replace_in_two_steps(staging, target)
        sync_folder(target.parent)
    if staging.exists():  # after an exchange it is the old target
        remove_tree(staging)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step (Linux renameat2); False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None), "renameat2", None)
    if function is None:
        return False
    at_cwd, exchange = -100, 2
    return bool(function(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)


def _replace_in_two_steps(staging: Path, target: Path) -> None:
    old = staging.with_name(staging.name.replace(".tmp-", ".old-"))
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    remove_tree(old)


def _try_lock(folder: Path) -> Callable[[], None] | None:
    """Return how to release the lock on `folder`, or None if another process holds it."""
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder", hint="check the path")
    with write_errors(folder):
        try:
            descriptor = _flock(folder)
        except BlockingIOError:
            return None
        if descriptor is None:
            return _try_lock_file(folder / LOCK_FILE)
        if not folder.is_dir() or folder.stat().st_ino != os.fstat(descriptor).st_ino:
            os.close(descriptor)  # it was exchanged for another one meanwhile
            return None
    return lambda: os.close(descriptor)


def _try_lock_file(path: Path) -> Callable[[], None] | None:
    try:
        path.open("xb").close()
    except FileExistsError:
        return None
    return lambda: path.unlink(missing_ok=True)


def _flock(folder: Path) -> int | None:
    """Lock a folder for this process and return the open descriptor; None where the system has no such locks.

    Raises:
        BlockingIOError: if another process holds it.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a network disk without locks on folders
        os.close(descriptor)
        return None
    return descriptor


def _remove_stale(target: Path) -> None:
    """Remove staging folders for `target` whose process is gone: nobody holds their lock."""
    prefix = f".{target.name}.tmp-"
    with write_errors(target):
        for path in [path for path in target.parent.iterdir() if path.name.startswith(prefix) and path.is_dir()]:
            try:
                lock = _flock(path)
            except BlockingIOError:
                continue
            if lock is not None:
                remove_tree(path)
                os.close(lock)


def remove_tree(folder: Path) -> None:
    """Remove a folder; a Ctrl-C meanwhile waits until it is gone."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # someone else put something there: not ours to remove
        return


def _is_full(error: BaseException) -> bool:
    """Whether an exception, also one of a native library, says that the disk is full."""
    if isinstance(error, EdgeAdaptError) or not isinstance(error, Exception):
        return False
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(text in str(error) for text in _FULL_TEXTS)


def _raise_full(target: Path, error: BaseException) -> NoReturn:
    raise FileError(
        f"cannot write {target}: the disk is full ({_reason(error)})",
        hint="free some space or choose a target on another disk; nothing was left behind",
    ) from error


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _write_hint(folder: Path) -> str:
    return f"check that {folder} is a folder that you may write to"


def _plain(value: Any) -> Any:
    if type(value).__module__ == "numpy" and value.ndim == 0:  # a scalar; numpy is not imported for the check
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")
