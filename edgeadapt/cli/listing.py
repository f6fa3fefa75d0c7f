"""`edgeadapt list`: what this installation knows."""

from __future__ import annotations

import ast
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from edgeadapt import registry, settings
from edgeadapt.cli import output
from edgeadapt.cli.options import Json


class Topic(StrEnum):
    """What can be listed."""

    kinds = "kinds"
    schemes = "schemes"
    devices = "devices"
    recipes = "recipes"


_SCHEMES = "edgeadapt.quantize.schemes"


def listing(
    *,
    topic: Annotated[Topic, typer.Argument(metavar="kinds|schemes|devices|recipes", show_default=False)],
    json: Json = False,
) -> None:
    """List adapter kinds, quantization schemes, devices or recipes."""
    if topic == Topic.kinds:
        from edgeadapt.adapters.read import known_kinds

        rows = known_kinds()
    elif topic == Topic.schemes:
        rows = {name: _first_line(f"{_SCHEMES}.{name}") for name in registry.names(_SCHEMES)}
    else:
        rows = {name: settings.summary(settings.find(topic, name)) for name in settings.names(topic)}
    if json:
        output.result_json([{"name": name, "summary": summary} for name, summary in rows.items()])
        return
    width = max(len(name) for name in rows)
    for name, summary in rows.items():
        output.result(f"{name:<{width}}  {summary}".rstrip())


def _first_line(module: str) -> str:
    """Return the first line of a module's docstring, from its source: importing it may load heavy libraries."""
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]
