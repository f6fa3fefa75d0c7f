"""`edgeadapt remove`: an adapter out of a bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeadapt.cli.options import BundlePath, Json, Quiet
from edgeadapt.cli.progress import reporter


def remove(
    *,
    bundle: BundlePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name in the bundle.", show_default=False)],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove an adapter from a bundle."""
    from edgeadapt.addition import remove_adapter
    from edgeadapt.cli.summary import show_bundle

    with reporter(quiet=quiet) as progress:
        changed = remove_adapter(bundle, name, progress=progress)
    show_bundle(changed, as_json=json, quiet=quiet)
