"""`edgeadapt report`: profiles that were written, as tables, pages and files for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeadapt.cli import output
from edgeadapt.cli.options import Quiet

_FORMATS = ("html", "markdown", "csv", "trace")


def report(
    *,
    profiles: Annotated[
        list[Path],
        typer.Argument(metavar="PROFILE.json...", help="What `edgeadapt profile --output` wrote.", show_default=False),
    ],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page for a browser, one file.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write a Markdown table.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write numbers for a spreadsheet.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write operators for chrome://tracing or Perfetto.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Show profiles side by side; each keeps a column of its own."""
    from edgeadapt.profiling.labels import table
    from edgeadapt.profiling.reports import write_report
    from edgeadapt.profiling.stored import read_profile

    found = [read_profile(path) for path in profiles]
    for name, path in zip(_FORMATS, (html, markdown, csv, trace), strict=True):
        if path is not None:
            write_report(name, path, found)
    if quiet:
        return
    head, *body = table(found)
    output.table("Profiles", [dict(zip(head, cells, strict=True)) for cells in body])
    for name, each in zip(head[1:], found, strict=True):
        for warning in (*each.notes, *each.warnings, *each.failures):
            output.warning(f"{name}: {warning}")
