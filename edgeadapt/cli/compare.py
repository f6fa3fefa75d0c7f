"""`edgeadapt compare`: how one bundle's figures stand to another one's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeadapt.cli import output
from edgeadapt.cli.options import Json, Quiet, Threads
from edgeadapt.cli.progress import reporter

if TYPE_CHECKING:
    from edgeadapt.profiling.compare import Comparison

_METAVAR = "BUNDLE|PROFILE.json"


def compare(
    *,
    a: Annotated[Path, typer.Argument(metavar=_METAVAR, help="What is 1.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar=_METAVAR, help="What stands over it.", show_default=False)],
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="Where both run.", show_default="cpu")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", metavar="NAME", help="What opens both.", show_default="the device's")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="NAME", help="Active in both.", show_default="the bare base"),
    ] = None,
    threads: Threads = None,
    rounds: Annotated[
        int | None, typer.Option(min=5, help="How often each is measured, in turns.", show_default="5")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of a prompt, or of a text.", show_default="128")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens written after it.", show_default="64")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Answers in a round; ten times as many single passes.", show_default="1")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows at once.", show_default="1")] = None,
    models: Annotated[
        list[Path] | None,
        typer.Option(
            "--models",
            metavar="FOLDER",
            help="As of `edgeadapt profile`: A's folder, and again B's.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for each process.", show_default="no limit")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure two bundles in turns, or take two written profiles, and show ratios with 95 % intervals."""
    from edgeadapt.fields import to_mapping
    from edgeadapt.profiling.compare import compare_bundles, compare_profiles
    from edgeadapt.profiling.stored import read_profile

    numbers = {"rounds": rounds, "new_tokens": new_tokens, "repeats": repeats, "batch_size": batch_size}
    settings: dict[str, Any] = {"device": device, "runtime": runtime, "adapter": adapter, "threads": threads}
    settings |= {**numbers, "prompt_tokens": prompt_tokens, "models": models, "timeout_s": timeout}
    given = {name: value for name, value in settings.items() if value is not None}
    if a.is_file() != b.is_file():
        raise typer.BadParameter("give two bundles or two profiles", param_hint=f"{a} and {b}")
    if a.is_file():
        _check_unused(given)
        found = compare_profiles(read_profile(a), read_profile(b))
    else:
        with reporter(quiet=quiet) as progress:
            found = compare_bundles(a, b, **given, progress=progress)
    if json:
        output.result_json(to_mapping(found))
    elif not quiet:
        _show(found)


def _check_unused(given: dict[str, Any]) -> None:
    if given:
        flag = "--" + next(iter(given)).removesuffix("_s").replace("_", "-")
        raise typer.BadParameter("only goes with bundles: profiles are measured already", param_hint=flag)


def _show(found: Comparison) -> None:
    from edgeadapt.profiling.catalogue import FIGURES, text

    rows = [
        {
            "figure": FIGURES[each.figure].title,
            "A": text(each.figure, each.a),
            "B": text(each.figure, each.b),
            "B / A": None if each.ratio is None else f"{each.ratio:.3f}",
            "95 %": None if each.low is None else f"{each.low:.3f} to {each.high:.3f}",
            "better": None if each.better is None else each.better.upper(),
        }
        for each in found.ratios
    ]
    how = f"measured in turns, {found.rounds} rounds" if found.rounds else "from written profiles"
    output.table(f"A: {found.a}, B: {found.b}; {how}", rows)
    for note in found.notes:
        output.warning(note)
