"""Profiles as files for people and other programs. A format is one file here, found by its name: `render`.

Several profiles stand beside each other, one column or chart each; figures of two machines are never merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeadapt import registry
from edgeadapt.errors import ProfileError
from edgeadapt.files import write_atomically
from edgeadapt.profiling.figures import Profile


def write_report(report_format: str, path: Path, profiles: Sequence[Profile]) -> None:
    """Write a report of one or several profiles; a reader never sees half of it.

    Args:
        report_format: a file in this folder that has `render(profiles) -> str`.
        path: what to write.
        profiles: in the order of the columns.

    Raises:
        ProfileError: if there is no such format, no profile, or nothing to show in it.
        FileError: if the file cannot be written.
    """
    module = registry.load(__name__, report_format, ProfileError)
    if not profiles:
        raise ProfileError("there is no profile to report", hint="give at least one")
    text: str = module.render(profiles)
    write_atomically(path, text.encode())
