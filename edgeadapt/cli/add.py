"""`edgeadapt add`: one more adapter into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeadapt.cli.options import BundlePath, Json, Quiet
from edgeadapt.cli.progress import reporter


def add(
    *,
    bundle: BundlePath,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder or file.", show_default=False)
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="The adapter's name in the bundle.", show_default="its folder's name")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="Compare with torch on this base too (needs edgeadapt[export])."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter of the same name.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add an adapter to a bundle; needs neither torch nor the base."""
    from edgeadapt.addition import add_adapter
    from edgeadapt.cli.summary import show_bundle

    with reporter(quiet=quiet) as progress:
        changed = add_adapter(bundle, adapter, name=name, base=base, force=force, progress=progress)
    show_bundle(changed, as_json=json, quiet=quiet)
