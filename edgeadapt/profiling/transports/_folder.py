"""Devices that are a folder of this machine and programs that run there."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeadapt.errors import ProfileError
from edgeadapt.files import remove_tree
from edgeadapt.profiling.transports import Completed, Transport, _failures
from edgeadapt.profiling.transports._process import run_process

_PROBE_S = 120.0


class FolderTransport(Transport):
    """A folder for temporary files that goes with `close`.

    where: the device in messages; folder: its path; before: what stands before every program's arguments
    """

    before: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.where = f"{name} (this machine)"
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="edgeadapt-"))
        except OSError as error:
            raise ProfileError(
                f"this machine has no folder for temporary files: {error.strerror or error}",
                hint="free some space, or point TMPDIR to a folder that you may write to",
            ) from error
        self._sent = 0

    def send(self, files: Mapping[str, Path]) -> str:
        _failures.check_files(files)
        self._sent += 1
        target = self.folder / str(self._sent)
        try:
            for name, path in files.items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, target / name)
        except OSError as error:
            remove_tree(target)
            raise _failures.not_written(files, str(target), self.where, error.strerror or str(error)) from error
        return str(target)

    def run(self, arguments: Sequence[str], *, cwd: str, stdin: str = "", timeout_s: float | None = None) -> Completed:
        environment = os.environ | {"TMPDIR": str(self.folder)}  # what libraries leave behind goes with it
        command = [*self.before, *arguments]
        try:
            return run_process(command, cwd=cwd, stdin=stdin, timeout_s=timeout_s, environment=environment)
        except subprocess.TimeoutExpired as error:
            raise _failures.too_slow(arguments, self.where, timeout_s or 0) from error

    def close(self) -> None:
        remove_tree(self.folder)
        if self.folder.exists():
            raise _failures.left_behind(str(self.folder), self.where)

    def probe(self, arguments: Sequence[str]) -> Completed:
        """Run a program that answers soon."""
        return self.run(arguments, cwd=str(self.folder), timeout_s=_PROBE_S)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the file `source`: a second name for the same bytes where one disk holds both, else a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, another user's file, or a disk without links
        shutil.copyfile(source, target)
