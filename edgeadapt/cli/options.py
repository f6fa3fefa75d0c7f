"""Arguments and flags that several commands share, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables; warnings and errors only.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Intra-op threads.", show_default="one per core")]


def read_pairs(flag: str, text: list[str], value_name: str) -> dict[str, str]:
    """Return "KEY=VALUE" texts as a dict.

    Raises:
        typer.BadParameter: if one is of another form, or a key occurs twice.
    """
    pairs: dict[str, str] = {}
    for item in text:
        key, equals, value = item.rpartition("=")
        if not (key and equals and value):
            raise typer.BadParameter(f"{item!r} is not of the form {value_name}", param_hint=flag)
        if key in pairs:
            raise typer.BadParameter(f"{key!r} occurs twice", param_hint=flag)
        pairs[key] = value
    return pairs


def read_budgets(text: list[str]) -> dict[str, float]:
    """Return "FIGURE=LIMIT" texts as limits by figure.

    Raises:
        typer.BadParameter: if one is of another form, a figure occurs twice or is none of a profile, or a limit is no
            finite number from 0 on.
    """
    from edgeadapt.errors import ProfileError
    from edgeadapt.profiling.budget import named_budgets

    budgets = {}
    for name, value in read_pairs("--budget", text, "FIGURE=LIMIT").items():
        try:
            budgets[name] = float(value)
        except ValueError as error:
            raise typer.BadParameter(
                f"{value!r}, the limit of {name!r}, is not a number", param_hint="--budget"
            ) from error
    try:
        return named_budgets(budgets)
    except ProfileError as error:
        raise typer.BadParameter(f"{error.message}; {error.hint}", param_hint="--budget") from error


def read_blend(text: str) -> dict[str, float]:
    """Return "A=0.7,B=0.3" as weights by adapter.

    Raises:
        typer.BadParameter: as `read_weights`.
    """
    return read_weights("--blend", text.split(","))


def read_weights(flag: str, text: list[str]) -> dict[str, float]:
    """Return "NAME=WEIGHT" texts as weights by adapter.

    Raises:
        typer.BadParameter: if one is of another form, a name occurs twice, or a weight is no finite number.
    """
    weights: dict[str, float] = {}
    for key, value in read_pairs(flag, text, "NAME=WEIGHT").items():
        try:
            weight = float(value)
        except ValueError as error:
            raise typer.BadParameter(f"{value!r}, the weight of {key!r}, is not a number", param_hint=flag) from error
        if weight - weight != 0:  # infinite or NaN
            raise typer.BadParameter(f"{value!r}, the weight of {key!r}, is not finite", param_hint=flag)
        weights[key] = weight
    return weights
