"""`edgeadapt profile`: how fast and how large a bundle is on a device."""

from __future__ import annotations

from dataclasses import replace
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
    runtime: Annotated[
        str | None,
        typer.Option("--runtime", metavar="NAME", help="What opens the models.", show_default="the device's"),
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Where the device is: USER@HOST[:PORT], an adb serial, ...")
    ] = None,
    interpreter: Annotated[
        str | None, typer.Option("--interpreter", help="The Python there.", show_default="python3")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="NAME", help="The active adapter.", show_default="the bare base"),
    ] = None,
    threads: Threads = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Length of a prompt, or of a text; again for more lengths.", show_default="128"),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written after the first length.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Answers written; ten times as many single passes.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 1,
    operators: Annotated[bool, typer.Option("--operators", help="Time each operator too.")] = False,
    attempts: Annotated[int, typer.Option(min=1, help="Tries while other work disturbs the timing.")] = 2,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for each process.", show_default="no limit")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure load time, latency, what an adapter costs, swap time and memory, in processes of their own."""
    from edgeadapt import profiling
    from edgeadapt.device import read_device
    from edgeadapt.errors import ProfileError
    from edgeadapt.fields import to_mapping

    target = read_device(device)
    target = replace(target, address=address or target.address, interpreter=interpreter or target.interpreter)
    with reporter(quiet=quiet) as progress:
        measured = profiling.profile(
            bundle,
            device=target,
            adapter=adapter,
            threads=threads,
            prompt_tokens=prompt_tokens or 128,
            new_tokens=new_tokens,
            repeats=repeats,
            batch_size=batch_size,
            runtime=runtime,
            operators=operators,
            attempts=attempts,
            timeout_s=timeout,
            progress=progress,
        )
    if json:
        output.result_json(to_mapping(measured))
    elif not quiet:
        output.table(f"{bundle} on {target.title}", profiling.rows(measured))
        for warning in (*measured.notes, *measured.warnings):
            output.warning(warning)
    if measured.failures:
        raise ProfileError("not all was measured: " + "; ".join(measured.failures), hint="see the figures that were")
