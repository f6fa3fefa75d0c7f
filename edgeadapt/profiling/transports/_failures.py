"""What goes wrong with any device, in the same words for every transport."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from edgeadapt.errors import ProfileError

_FULL = ("No space left on device", "Disk quota exceeded", "File too large", "File size limit exceeded")


def lost(where: str) -> ProfileError:
    """Return the error for a device that went away."""
    return ProfileError(
        f"{where} was lost: the connection ended before its work did",
        hint="check its power, cable and network and run the command again; it removes the sent files by itself",
    )


def too_slow(arguments: Sequence[str], where: str, timeout_s: float) -> ProfileError:
    """Return the error for a program that was killed because its time was over."""
    program = PurePosixPath(arguments[1] if len(arguments) > 1 else arguments[0]).name
    return ProfileError(
        f"{program} took longer than {timeout_s:g} s on {where} and was stopped there",
        hint="allow more time, or fewer repeats or tokens",
    )


def not_written(files: Mapping[str, Path], folder: str, where: str, complaints: str) -> ProfileError:
    """Return the error for files that the device did not take, by what the system there said."""
    reason = reason_in(complaints)
    total = sum(path.stat().st_size for path in files.values())
    what = f"{len(files)} files of {total / 1e6:.1f} MB together"
    if is_full(reason):
        return ProfileError(
            f"the disk of {where} is full: {folder} does not take {what} ({reason})",
            hint="free some space there, or point TMPDIR on the device to a folder on another disk",
        )
    return ProfileError(
        f"{where} does not take {what} in {folder}: {reason}",
        hint="check that its user may write there, or point TMPDIR on the device to another folder",
    )


def is_full(text: str) -> bool:
    """Whether a program's message says that a disk or a quota is exhausted."""
    return any(words in text for words in _FULL)


def left_behind(folder: str, where: str) -> ProfileError:
    """Return the error for files whose removal nobody confirmed."""
    return ProfileError(
        f"{where} did not confirm that {folder} was removed",
        hint=f"the device removes it when it notices the lost connection; else remove {folder} there yourself",
    )


def reason_in(text: str) -> str:
    """Return the line of a program's complaints that says the most: the one of a full disk, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next(filter(is_full, lines), lines[-1] if lines else "it gave no reason")


def check_files(files: Mapping[str, Path]) -> None:
    """Check what is to be sent.

    Raises:
        ProfileError: if there is nothing, a name leads out of the folder, or a file is missing.
    """
    if not files:
        raise ProfileError("there are no files to send to the device", hint="please report this")
    for name, path in files.items():
        parts = name.split("/")
        if not name or "\0" in name or "\\" in name or {"", ".", ".."} & set(parts):
            raise ProfileError(f"{name!r} is no name of a file inside a folder", hint="use names like model/a.onnx")
        if not path.is_file():
            raise ProfileError(f"{path} cannot be sent: it is no file", hint="check the path")
