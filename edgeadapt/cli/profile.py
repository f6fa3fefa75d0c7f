"""`edgeadapt profile`: how fast and how large a bundle is on a device."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeadapt.cli import output
from edgeadapt.cli.options import BundlePath, Json, Quiet
from edgeadapt.cli.progress import reporter


def profile(
    *,
    bundle: BundlePath,
    device: Annotated[
        str,
        typer.Option("--device", metavar="DEVICE", help="See `edgeadapt list devices`; or a .toml file."),
    ],
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="NAME", help="Measure this adapter against the bare base.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure load time, latency, what an adapter costs, swap time and memory."""
    from edgeadapt import profiling
    from edgeadapt.device import read_device, require_this_machine
    from edgeadapt.fields import to_mapping

    target = read_device(device)
    require_this_machine(target)
    with reporter(quiet=quiet) as progress:
        figures = to_mapping(profiling.profile(bundle, target, adapter=adapter, progress=progress))
    if json:
        output.result_json(figures)
    elif not quiet:
        output.figures(f"{bundle} on {target.title}", figures)
