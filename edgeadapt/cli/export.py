"""`edgeadapt export`: adapters and their base into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from edgeadapt.cli.options import Json, Quiet, read_pairs
from edgeadapt.cli.progress import reporter


def export(
    *,
    adapters: Annotated[
        list[Path] | None, typer.Argument(metavar="ADAPTER...", help="Adapter folders or files.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="The base model: a folder, a GGUF file or a hub id.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="The bundle's folder, by habit NAME.bundle.")
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="NAME", help="An adapter's name in the bundle; once per adapter, in order."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="What the model does, by its optimum name.", show_default="from the model"),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="The hub commit of the base.")] = None,
    merge: Annotated[
        bool | None, typer.Option("--merge/--no-merge", help="Put the adapter into the weights for good.")
    ] = None,
    merge_base: Annotated[
        Literal["dequantized", "original"] | None,
        typer.Option("--merge-base", help="The base that a QLoRA adapter is merged into.", show_default="dequantized"),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", metavar="SCHEME", help="`edgeadapt list schemes`.", show_default="int8"),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option("--block-size", help="Weights that share a scale: 64 is faster, 16 closer.", show_default="32"),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="PATTERN=SCHEME", help="An exception: modules that get another scheme."),
    ] = None,
    kv_cache: Annotated[
        Literal["float32", "int8"] | None,
        typer.Option(
            "--kv-cache",
            help="What keys and values are held in; int8 takes a quarter of the memory.",
            show_default="float32",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", metavar="FILE", help="Samples for calibration and the quality table.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option("--max-bytes", metavar="BYTES", help="int4: as many layers in 8 bits as the weights may take."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            help="The largest mean KL divergence (nats) from torch; int4 raises layers to 8 bits for it.",
        ),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1",
            help="The smallest share (0 to 1) of top-1 answers that agree with torch; int4 raises layers for it.",
        ),
    ] = None,
    prune_kl: Annotated[
        float | None,
        typer.Option("--prune-kl", help="Leave out ranks and sites of adapters, up to this mean KL divergence (nats)."),
    ] = None,
    adapter_dtype: Annotated[
        Literal["float32", "float16", "int8"] | None,
        typer.Option("--adapter-dtype", help="How adapters are stored.", show_default="float16 if quantized"),
    ] = None,
    residual_rank: Annotated[
        int | None,
        typer.Option("--residual-rank", help="Keep what int4 leaves of the weights at this rank, beside adapters."),
    ] = None,
    patches: Annotated[
        bool | None,
        typer.Option("--patches/--no-patches", help="Let devices promote each adapter to weights of its own."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="The longest sequence, in tokens.", show_default="the model's")
    ] = None,
    force: Annotated[
        bool | None, typer.Option("--force/--no-force", help="Replace an existing bundle once the new one is whole.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="FILE", help="A .toml file or a shipped recipe; flags override it."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn trained adapters and their base into one bundle that runs without torch."""
    settings = _given(
        adapters=[str(path) for path in adapters or ()],
        base=base,
        output=None if output is None else str(output),
        names=list(names or ()),
        task=task,
        revision=revision,
        merge=merge,
        merge_base=merge_base,
        quantize=quantize,
        block_size=block_size,
        keep=read_pairs("--keep", keep or [], "PATTERN=SCHEME"),
        kv_cache=kv_cache,
        calibrate=None if calibrate is None else str(calibrate),
        max_bytes=max_bytes,
        max_kl=max_kl,
        min_top1=min_top1,
        prune_kl=prune_kl,
        adapter_dtype=adapter_dtype,
        residual_rank=residual_rank,
        patches=patches,
        max_length=max_length,
        force=force,
    )
    if recipe is None:
        _require(settings)

    from edgeadapt.cli.summary import show_bundle
    from edgeadapt.recipe import read_recipe

    wanted = read_recipe(recipe, settings)
    from edgeadapt.merging.threads import let_threads_sleep

    let_threads_sleep()
    with reporter(quiet=quiet) as progress:
        from edgeadapt.pipeline import export_bundle

        bundle = export_bundle(wanted, progress)
    show_bundle(bundle, as_json=json, quiet=quiet)


def _given(**values: Any) -> dict[str, Any]:
    """Return the flags that were used: a flag that was not leaves the recipe's value, or the default."""
    return {key: value for key, value in values.items() if value is not None and value not in ([], {})}


def _require(settings: dict[str, Any]) -> None:
    for key, flag in (("adapters", "ADAPTER..."), ("base", "--base"), ("output", "--output")):
        if key not in settings:
            raise typer.BadParameter("missing; give it here or in a recipe (--recipe)", param_hint=flag)
