"""`edgeadapt enroll`: examples for a Tip-Adapter of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeadapt.cli.arrays import read_arrays
from edgeadapt.cli.options import BundlePath, Json, Quiet
from edgeadapt.cli.progress import reporter
from edgeadapt.errors import SessionError


def enroll(
    *,
    bundle: BundlePath,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The adapter; a new name makes a new one.", show_default=False)
    ],
    label: Annotated[
        str, typer.Option("--class", metavar="CLASS", help="What the examples are: a label or a class's number.")
    ],
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="A picture of it; may be given several times.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", metavar="FILE.npz", help="Examples as arrays by the graph's input names.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="What all votes are multiplied by.", show_default="as it is, or 1")
    ] = None,
    beta: Annotated[
        float | None, typer.Option("--beta", help="How much closer examples count for more.", show_default="5.5")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add examples of a class to a Tip-Adapter, which knows them at once. Needs no training and no torch."""
    from edgeadapt.bundle import open_bundle
    from edgeadapt.cli.summary import show_bundle
    from edgeadapt.enrolment import enroll as enroll_examples
    from edgeadapt.runtime.images import pixel_values
    from edgeadapt.runtime.tokenizer import read_json_asset

    if bool(image) == (inputs is not None):
        raise SessionError("examples are pictures or arrays", hint="give --image FILE, or --inputs FILE.npz")
    opened = open_bundle(bundle)
    if inputs is not None:
        arrays = read_arrays(inputs)
    else:
        arrays = {"pixel_values": pixel_values(image or [], read_json_asset(opened, "preprocessor_config.json"))}
    count = len(next(iter(arrays.values()))) if arrays else 0
    with reporter(quiet=quiet) as progress:
        changed = enroll_examples(opened, name, arrays, [label] * count, alpha=alpha, beta=beta, progress=progress)
    show_bundle(changed, as_json=json, quiet=quiet)
