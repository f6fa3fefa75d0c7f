"""`edgeadapt convert`: an adapter into a file that another program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from edgeadapt.cli import output
from edgeadapt.cli.options import Json, Quiet
from edgeadapt.cli.progress import reporter


def convert(
    *,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder, of any layout.", show_default=False)
    ],
    base: Annotated[
        str,
        typer.Option("--base", metavar="BASE", help="Its base: a folder, a GGUF file or a hub id.", show_default=False),
    ],
    to: Annotated[Literal["gguf"], typer.Option("--to", help="gguf: LoRA for llama.cpp's --lora.", show_default=False)],
    target: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.", show_default=False)
    ],
    dtype: Annotated[Literal["f32", "f16"], typer.Option("--dtype", help="What numbers are held in.")] = "f32",
    revision: Annotated[str | None, typer.Option("--revision", help="The hub commit of the base.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter as another program reads it, proven against its base first."""
    from edgeadapt.conversion import convert_adapter

    with reporter(quiet=quiet) as progress:
        made = convert_adapter(
            adapter, base, target, to=to, dtype=dtype, revision=revision, force=force, progress=progress
        )
    if json:
        output.result_json({"path": str(made.path), **made.facts})
    elif not quiet:
        output.figures(str(made.path), made.facts)
