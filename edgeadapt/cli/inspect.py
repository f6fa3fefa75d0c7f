"""`edgeadapt inspect`: what an adapter, a bundle or a base is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgeadapt.cli import output
from edgeadapt.cli.options import Json


def inspect(
    *,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="An adapter's folder or file, or a bundle.", show_default=False)
    ],
    base: Annotated[
        Path | None,
        typer.Option("--base", help="An adapter's base, folder or GGUF file, to tell its share.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Show what is in an adapter, a bundle or a base model's folder, without loading any of it."""
    if (path / "manifest.json").is_file():
        from edgeadapt.bundle import open_bundle
        from edgeadapt.cli.summary import show_bundle

        show_bundle(open_bundle(path), as_json=json, quiet=False)
        return
    if _is_base(path):
        described: dict[str, Any] = {"base": _describe_base(path)}
    else:
        described = {"adapters": _describe_adapters(path, base)}
    if json:
        output.result_json(described)
    else:
        _show(path, described)


def _describe_adapters(path: Path, base: Path | None) -> list[dict[str, Any]]:
    from edgeadapt.adapters import describe, read_adapters

    whole = None
    if base is not None:
        from edgeadapt.adapters import parameter_count

        whole = parameter_count(base)
    return [_with_share(describe(adapter), whole) for adapter in read_adapters(path)]


def _with_share(described: dict[str, Any], whole: int | None) -> dict[str, Any]:
    """Return what is known of an adapter with its share of the base's parameters, null without the base."""
    share = None if whole is None else round(described["parameters"] / whole, 6)
    return {key: value for key, value in described.items() if key != "warnings"} | {
        "share_of_base": share,
        "warnings": described["warnings"],
    }


def _is_base(path: Path) -> bool:
    return (path / "config.json").is_file() and not any(path.rglob("adapter_*.*"))


def _describe_base(path: Path) -> dict[str, Any]:
    """Return what a Hugging Face model folder says about itself."""
    from edgeadapt.errors import BaseModelError
    from edgeadapt.files import parse_json, read_bytes

    file = path / "config.json"
    config = parse_json(read_bytes(file), str(file), BaseModelError)
    if not isinstance(config, dict) or "model_type" not in config:
        raise BaseModelError(f"{file} names no model_type", hint="give a folder that transformers can load")
    weights = sorted(item for item in path.iterdir() if item.suffix in {".safetensors", ".bin", ".gguf"})
    return {
        "name": path.resolve().name,
        "model_type": config["model_type"],
        "architectures": config.get("architectures"),
        "weights": {item.name: item.stat().st_size for item in weights},
    }


def _show(path: Path, described: dict[str, Any]) -> None:
    for label, things in described.items():
        for thing in things if isinstance(things, list) else [things]:
            warnings = thing.pop("warnings", [])
            output.figures(f"{label.removesuffix('s')} {thing.get('name', path)}", thing)
            for warning in warnings:
                output.warning(warning)
