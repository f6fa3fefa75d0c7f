"""`edgeadapt devices`: machines that a profile can be measured on or predicted for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgeadapt.cli import output
from edgeadapt.cli.options import Json, Quiet, Threads
from edgeadapt.cli.progress import reporter

app = typer.Typer(
    help="List devices, or write a file for this machine.",
    invoke_without_command=True,
    rich_markup_mode=None,
    add_completion=False,
)


@app.callback()
def listing(
    *,
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="List to stdout as JSON, and nothing else there.")] = False,
) -> None:
    """List devices, or write a file for this machine."""
    if context.invoked_subcommand is not None:
        if json:
            raise typer.BadParameter("belongs behind the command's name", param_hint="--json")
        return
    from edgeadapt import settings
    from edgeadapt.device import read_device
    from edgeadapt.fields import to_mapping

    devices = [read_device(name) for name in settings.names("devices")]
    if json:
        output.result_json([to_mapping(device) for device in devices])
        return
    rows: list[dict[str, Any]] = [
        {
            "name": device.name,
            "device": device.title,
            "cores": device.cores,
            "memory": None if device.memory_bytes is None else f"{device.memory_bytes / 2**30:.0f} GiB",
            "bandwidth": _per_s(device.memory_bandwidth_bytes_per_s, "GB/s"),
            "float32": _per_s(device.peak_flops_float32, "GFLOP/s"),
            "runtime": f"{device.runtime} ({device.provider})",
            "reached_by": device.transport,
        }
        for device in devices
    ]
    output.table("Devices", rows)


@app.command("detect")
def detect(
    *,
    file: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE.toml", help="The file to write.", show_default="stdout"),
    ] = None,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine: memory, arithmetic in float32 and int8, what an operator costs. Takes ten seconds."""
    from edgeadapt.device import device_toml
    from edgeadapt.fields import to_mapping
    from edgeadapt.files import write_atomically
    from edgeadapt.profiling.detect import detect_device

    if file is not None:
        _check_file(file, force)
    with reporter(quiet=quiet) as progress:
        found = detect_device(file.stem if file is not None else "this-machine", threads=threads, progress=progress)
    for warning in found.warnings:
        output.warning(f"{warning}: this machine may be faster than its figures")
    if file is not None:
        write_atomically(file, device_toml(found.device).encode())
    if json:
        output.result_json(to_mapping(found.device))
    elif file is None:
        output.result(device_toml(found.device), newline=False)
    elif not quiet:
        output.text(f"{file} is written; use it with --device {file}")


def _check_file(file: Path, force: bool) -> None:
    """Refuse what cannot become a device's file before anything is measured."""
    from edgeadapt.errors import FileError
    from edgeadapt.files import check_writable

    if file.suffix != ".toml":
        raise typer.BadParameter(f"{file} does not end in .toml, by which a device's file is known", param_hint="-o")
    if file.exists() and not force:
        raise FileError(f"{file} exists already", hint="choose another target, or replace it with --force")
    check_writable(file)


def _per_s(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value / 1e9:.4g} {unit}"
