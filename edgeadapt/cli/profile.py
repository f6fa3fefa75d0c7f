"""`edgeadapt profile`: how fast and how large a bundle is on a device."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeadapt.cli import output
from edgeadapt.cli.options import BundlePath, Json, Quiet, Threads
from edgeadapt.cli.progress import reporter


def profile(
    *,
    bundle: BundlePath,
    device: Annotated[
        str,
        typer.Option("--device", metavar="DEVICE", help="See `edgeadapt list devices`; or a .toml file."),
    ],
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="NAME", help="The active adapter.", show_default="the bare base"),
    ] = None,
    threads: Threads = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of a prompt, or of a text.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written after it.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Answers written; ten times as many single passes.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure load time, latency, what an adapter costs, swap time and memory, in processes of their own."""
    from edgeadapt import profiling
    from edgeadapt.device import read_device
    from edgeadapt.fields import to_mapping

    target = read_device(device)
    with reporter(quiet=quiet) as progress, progress.stage(f"measure on {target.title}"):
        measured = profiling.profile(
            bundle,
            device=target,
            adapter=adapter,
            threads=threads,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            batch_size=batch_size,
        )
    if json:
        output.result_json(to_mapping(measured))
    elif not quiet:
        output.table(f"{bundle} on {target.title}", profiling.rows(measured))
