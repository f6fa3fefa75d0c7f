"""What people and programs see: JSON and results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_A_FILE = 120


def console() -> Console:
    """Return a console on stderr that takes text as it is: no markup, no highlighting."""
    from rich.console import Console

    width = None if sys.stderr.isatty() else _WIDTH_OF_A_FILE
    return Console(stderr=True, width=width, markup=False, highlight=False, emoji=False)


def result(text: str, *, newline: bool = True) -> None:
    """Write text that a program may read to stdout."""
    typer.echo(text, nl=newline)


def result_json(value: Any) -> None:
    """Write a JSON document to stdout."""
    result(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def error(message: str, hint: str | None) -> None:
    """Write an error and the next step to stderr."""
    from rich.text import Text

    printer = console()
    printer.print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)
    if hint:
        printer.print(Text.assemble(("hint: ", "bold"), hint), soft_wrap=True)


def warning(message: str) -> None:
    """Write a warning to stderr."""
    from rich.text import Text

    console().print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)


def text(line: str) -> None:
    """Write a line for people to stderr."""
    from rich.text import Text

    console().print(Text(line), soft_wrap=True)


def fields(title: str, values: Mapping[str, Any]) -> None:
    """Write one thing's properties to stderr, one a line; a nested mapping is indented, None left out."""
    from rich.text import Text

    printer = console()
    printer.print(Text(title, style="bold"), soft_wrap=True)
    for line in _lines(values, "  "):
        printer.print(Text(line), soft_wrap=True)


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to stderr under the union of their keys; a key without any value is left out, as are no rows."""
    if not rows:
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in rows for key in row if any(r.get(key) is not None for r in rows)))
    view = Table(title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numeric = any(isinstance(row.get(column), int | float) for row in rows)
        view.add_column(
            Text(column.replace("_", " ")),
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=column == columns[0],
        )
    for row in rows:
        view.add_row(*(Text(cell(row.get(column))) for column in columns))
    console().print(view)


def figures(title: str, values: Mapping[str, Any]) -> None:
    """Write one thing's properties to stderr; those that are rows of fields as tables after the others."""
    tables = {key: value for key, value in values.items() if _is_table(value)}
    fields(title, {key: value for key, value in values.items() if key not in tables})
    for key, rows in tables.items():
        table(key.replace("_", " "), rows)


def cell(value: Any) -> str:
    """Return a value as people read it: four significant digits, "–" for None, lists joined with commas."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    return str(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _lines(values: Mapping[str, Any], indent: str) -> Iterable[str]:
    width = max((len(key) for key in values), default=0)
    for key, value in values.items():
        if value is None or value in ({}, [], ()):
            continue
        label = f"{indent}{key.replace('_', ' '):<{width}}  "
        if isinstance(value, Mapping):
            yield label.rstrip()
            yield from _lines(value, indent + "  ")
        else:
            yield label + cell(value)
