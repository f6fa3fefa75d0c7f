"""`edgeadapt blend`: one more adapter for a bundle, made of those that are in it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from edgeadapt.cli import output
from edgeadapt.cli.options import BundlePath, Json, Quiet, read_weights
from edgeadapt.cli.progress import reporter

# As edgeadapt.bundle.combine.METHODS, which numpy comes with.
_Method = Literal[
    "cat", "linear", "svd", "ties", "dare_ties", "dare_linear", "magnitude_prune", "task_arithmetic"
]  # fmt: skip


def blend(
    *,
    bundle: BundlePath,
    weights: Annotated[
        list[str], typer.Argument(metavar="NAME=WEIGHT...", help="Adapters of the bundle.", show_default=False)
    ],
    name: Annotated[str, typer.Option("--as", metavar="NAME", help="The new adapter's name.", show_default=False)],
    method: Annotated[
        _Method,
        typer.Option(
            "--method",
            help="cat: the exact weighted sum, ranks side by side. task_arithmetic: the sum at its smallest rank. svd: "
            "the sum at --rank. magnitude_prune, ties, dare_linear, dare_ties: as peft's *_svd of these names, on the "
            "changes of weights. linear: A and B summed apart, as peft's; not a sum of adapters.",
        ),
    ] = "cat",
    density: Annotated[
        float | None,
        typer.Option("--density", help="The share of numbers that pruning methods keep.", show_default="0.5"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", help="The largest rank, for svd and pruning methods.", show_default="the adapters' largest"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of what the dare methods drop by chance.", show_default="0")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter of the same name.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make an adapter of others in a bundle; says how far it is from their exact weighted sum. Needs no torch."""
    from edgeadapt.blending import blend_adapters
    from edgeadapt.cli.summary import show_bundle

    shares = read_weights("NAME=WEIGHT", weights)
    with reporter(quiet=quiet) as progress:
        changed = blend_adapters(
            bundle,
            shares,
            name=name,
            method=method,
            density=density,
            rank=rank,
            seed=seed,
            force=force,
            progress=progress,
        )
    show_bundle(changed, as_json=json, quiet=quiet)
    made = changed.manifest.adapters[name].blend
    if made is not None and not (json or quiet):
        cut = f"; cutting ranks lost {made.rank_error:.3g} of the method's own result" if made.rank_error else ""
        output.text(f"{name}: {made.method}, error {made.error:.3g} against the exact weighted sum of products{cut}")
