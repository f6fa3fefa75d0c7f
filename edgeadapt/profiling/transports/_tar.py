"""Files as one stream, for devices that have tar."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from edgeadapt.profiling.transports._process import decoded, end_process, start_process


def send_tar(files: Mapping[str, Path], arguments: Sequence[str]) -> str | None:
    """Write files as a tar stream to a program of this machine; return what it complained of if it failed."""
    with tempfile.TemporaryFile() as said:
        child = start_process(arguments, stderr=said)
        try:
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it ended before, and says why
                _write(child.stdin, files)
                child.stdin.close()
            child.wait()
        finally:
            end_process(child)
        said.seek(0)
        return decoded(said.read()) if child.returncode != 0 else None


def _write(target: IO[bytes], files: Mapping[str, Path]) -> None:
    # Two names of one file are two files there: `dereference` keeps tarfile from making the second one a link.
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.GNU_FORMAT, dereference=True) as archive:
        for name, path in files.items():
            member = archive.gettarinfo(str(path), name)
            member.mode, member.uid, member.gid, member.uname, member.gname = 0o644, 0, 0, "", ""
            with path.open("rb") as content:
                archive.addfile(member, content)
