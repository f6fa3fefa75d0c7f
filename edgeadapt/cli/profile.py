"""`edgeadapt profile`: how fast and how large a bundle is on a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeadapt.cli import output as out
from edgeadapt.cli.options import BundlePath, Json, Quiet, Threads, read_budgets
from edgeadapt.cli.progress import reporter
from edgeadapt.errors import ProfileError

if TYPE_CHECKING:
    from edgeadapt.profiling import Profile
    from edgeadapt.profiling.transports import Invitation


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
    listen: Annotated[
        str | None,
        typer.Option("--listen", help="This machine's address for a phone's browser.", show_default="loopback"),
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
    models: Annotated[
        Path | None,
        typer.Option(
            "--models",
            metavar="FOLDER",
            help="Keep the models that are made for the runtime here, and take them from here next time.",
        ),
    ] = None,
    operators: Annotated[bool, typer.Option("--operators", help="Time each operator too.")] = False,
    attempts: Annotated[int, typer.Option(min=1, help="Tries while other work disturbs the timing.")] = 2,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for each process.", show_default="no limit")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="FIGURE=LIMIT",
            help="Fail if the profile's figure is worse; may be given several times.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Write the profile.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a report for a browser, one file.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure load time, latency, what an adapter costs, swap time and memory, in processes of their own."""
    from edgeadapt import profiling
    from edgeadapt.device import read_device
    from edgeadapt.fields import to_mapping
    from edgeadapt.files import check_writable

    budgets = read_budgets(budget or [])
    target = read_device(device)
    target = replace(
        target,
        address=address or target.address,
        listen=listen or target.listen,
        interpreter=interpreter or target.interpreter,
    )
    for file in filter(None, (output, html)):
        check_writable(file)
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
            models=models,
            operators=operators,
            attempts=attempts,
            timeout_s=timeout,
            announce=_invite,
            progress=progress,
        )
    if json:
        out.result_json(to_mapping(measured))
    elif not quiet:
        out.table(f"{bundle} on {target.title}", profiling.rows(measured))
        for warning in (*measured.notes, *measured.warnings):
            out.warning(warning)
    _keep(measured, output, html)
    _judge(measured, budgets)


def _invite(invitation: Invitation) -> None:
    """Say where somebody has to go, quiet or not: without it the command would wait for nobody."""
    out.text(f"{invitation.qr_code}\nopen {invitation.url}\n{invitation.remark}")


def _keep(measured: Profile, path: Path | None, html: Path | None) -> None:
    """Write what was asked for."""
    if path is not None:
        from edgeadapt.profiling.stored import write_profile

        write_profile(path, measured)
    if html is not None:
        from edgeadapt.profiling.reports import write_report

        write_report("html", html, [measured])


def _judge(measured: Profile, budgets: dict[str, float]) -> None:
    """Fail if a budget is not kept, or something could not be measured."""
    from edgeadapt.profiling.budget import broken

    breaks = broken(measured, budgets)
    if breaks:
        for each in breaks[:-1]:
            out.error(str(each), None)
        raise ProfileError(
            str(breaks[-1]),
            hint="; ".join(
                [
                    "make the bundle smaller or faster, or the budget larger",
                    *(f"not all was measured: {failure}" for failure in measured.failures),
                ]
            ),
        )
    if measured.failures:
        raise ProfileError("not all was measured: " + "; ".join(measured.failures), hint="see the figures that were")
