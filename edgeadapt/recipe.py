"""The settings of one export. The same word is a recipe's key, the field, the keyword argument and the flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgeadapt import registry, settings
from edgeadapt.errors import RecipeError
from edgeadapt.fields import from_mapping
from edgeadapt.quantize import BLOCK_SIZES

SCHEMES = "edgeadapt.quantize.schemes"


@dataclass(frozen=True)
class Recipe:
    """What an export reads, does and writes.

    adapters: adapter folders or files; a folder may hold several adapters
    base: a folder or GGUF file, or a Hugging Face hub id; None where `export_bundle` is given a loaded base
    output: the bundle's folder
    names: the adapters' names in the bundle, in their order; empty for their folders' names
    task: an optimum task name, None to tell it from the model; revision: the hub commit of the base
    merge: put the adapter into the weights: no swapping, no cost at run time
    merge_base: the base that a QLoRA adapter is merged into: the NF4 weights that it was trained on, dequantized (the
        default), or the original ones
    quantize: a scheme's file name in edgeadapt/quantize/schemes
    block_size: weights that share a scale, None for the scheme's own (32). 64 makes int8 and int4 smaller and faster
        and costs some quality, 16 the other way round
    keep: exceptions: pattern of module paths ("*.down_proj") to scheme
    kv_cache: what decoders hold keys and values in; int8 takes a quarter of the memory, for long texts that are written
    calibrate: a file of samples for schemes that measure activations, and for the quality table
    max_bytes: the most that the base's weights may take; int4 gives 8 bits to as many of its most sensitive layers as
        fit (or as few as max_kl and min_top1 ask for); None for no limit
    max_kl, min_top1: the quality gate: the largest mean KL divergence (nats) from the float model, and the smallest
        share of equal top-1 answers (0 to 1); None for no gate. int4 gives 8 bits to layers until they are kept
    prune_kl: leave out ranks and sites of each adapter as long as its answers differ from the whole adapter's by no
        more than this mean KL divergence (nats, on the samples, before quantizing); None leaves nothing out
    adapter_dtype: how adapters are stored (edgeadapt/bundle/stored.py); None for float32 where nothing is quantized,
        else float16
    residual_rank: keep of what int4 leaves of each weight that adapters change the part of this rank, and add it beside
        every adapter: better answers for more numbers read per token; None for none
    patches: write for each adapter what it changes in the quantized weights when merged, so that devices can promote it
        to a model of its own at no cost per token
    max_length: the longest sequence in tokens, None for what the model was trained for
    force: replace an existing bundle
    """

    adapters: tuple[Path, ...]
    base: str | None
    output: Path
    names: tuple[str, ...] = ()
    task: str | None = None
    revision: str | None = None
    merge: bool = False
    merge_base: Literal["dequantized", "original"] | None = None
    quantize: str = "int8"
    block_size: int | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    kv_cache: Literal["float32", "int8"] = "float32"
    calibrate: Path | None = None
    max_bytes: int | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    prune_kl: float | None = None
    adapter_dtype: Literal["float32", "float16", "int8"] | None = None
    residual_rank: int | None = None
    patches: bool = False
    max_length: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            RecipeError: if one does.
        """
        _check_adapters(self)
        _check_merge(self)
        _check_schemes(self)
        _check_gate(self)
        _check_adapter_settings(self)
        _check_residual(self)
        _check_patches(self)


def read_recipe(name: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe from a file, from `overrides`, or from a file with some fields overridden.

    A path in a recipe file is relative to that file; in `overrides` it is taken as it is.

    Args:
        name: the path of a .toml file, the name of a shipped recipe, or None for no file.
        overrides: fields that replace the file's, as TOML would hold them (paths as strings, lists for tuples).

    Raises:
        RecipeError: if there is no such recipe, or a field is unknown, missing, wrong, or contradicts another.
    """
    data: dict[str, Any] = {}
    where = "export settings"
    if name is not None:
        path = settings.find("recipes", name)
        where = str(path)
        data = _relative_to(path.parent, settings.read(path))
    return from_mapping(Recipe, {**data, **(overrides or {})}, where, RecipeError)


def _relative_to(folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's fields with paths made relative to its folder; values of wrong types are left for the reader."""

    def moved(value: Any) -> Any:
        return str(folder / Path(value).expanduser()) if isinstance(value, str) else value

    result = dict(data)
    for key in ("output", "calibrate"):
        if key in result:
            result[key] = moved(result[key])
    if isinstance(result.get("adapters"), list):
        result["adapters"] = [moved(item) for item in result["adapters"]]
    base = result.get("base")
    if isinstance(base, str) and (base.startswith((".", "/", "~")) or (folder / base).exists()):
        result["base"] = moved(base)
    return result


def _check_adapters(recipe: Recipe) -> None:
    if not recipe.adapters:
        raise RecipeError("there is no adapter to export", hint="name at least one adapter folder")
    for label, values in (("adapters", recipe.adapters), ("names", recipe.names)):
        twice = [str(value) for value in values if values.count(value) > 1]
        if twice:
            raise RecipeError(f"{label}: {twice[0]!r} occurs twice", hint="give every adapter once, by its own name")
    if recipe.base == "":
        raise RecipeError("base is empty", hint="give a folder, a GGUF file or a hub id")


def _check_merge(recipe: Recipe) -> None:
    if recipe.merge and len(recipe.adapters) > 1:
        raise RecipeError(
            f"merge takes one adapter, got {len(recipe.adapters)}",
            hint="export one merged bundle per adapter, or leave merge out to get one bundle that swaps them",
        )
    if recipe.merge_base is not None and not recipe.merge:
        raise RecipeError(
            f"merge_base is {recipe.merge_base!r}, and nothing is merged", hint="add merge, or leave merge_base out"
        )


def _check_schemes(recipe: Recipe) -> None:
    known = registry.names(SCHEMES)
    for label, scheme in [("quantize", recipe.quantize), *((f"keep[{key!r}]", v) for key, v in recipe.keep.items())]:
        if scheme not in known:
            raise RecipeError(f"{label}: unknown scheme {scheme!r}", hint=f"known: {', '.join(known)}")
    if recipe.block_size is not None and recipe.block_size not in BLOCK_SIZES:
        known_sizes = ", ".join(map(str, BLOCK_SIZES))
        raise RecipeError(f"block_size is {recipe.block_size}", hint=f"give one of {known_sizes}")
    if recipe.block_size is not None and recipe.quantize in {"none", "fp16"}:
        raise RecipeError(
            f"block_size is {recipe.block_size}, and {recipe.quantize} has no blocks", hint="choose int8 or int4"
        )
    if recipe.keep and recipe.quantize == "none":
        raise RecipeError("keep has exceptions, and nothing is quantized", hint="set quantize, or leave keep out")


def _check_adapter_settings(recipe: Recipe) -> None:
    for key in ("prune_kl", "adapter_dtype", "residual_rank"):
        if recipe.merge and getattr(recipe, key) is not None:
            raise RecipeError(
                f"{key} is {getattr(recipe, key)!r}, and the adapter is merged into the weights",
                hint=f"leave out merge or {key}",
            )
    if recipe.prune_kl is not None and not 0 < recipe.prune_kl < float("inf"):
        raise RecipeError(f"prune_kl must be above 0, got {recipe.prune_kl}", hint="0.001 is strict, 0.01 is loose")


def _check_residual(recipe: Recipe) -> None:
    if recipe.residual_rank is not None and recipe.quantize != "int4":
        raise RecipeError(
            f"residual_rank is {recipe.residual_rank}, and quantize is {recipe.quantize!r}",
            hint="only int4 leaves enough to keep: set quantize to int4, or leave residual_rank out",
        )
    if recipe.residual_rank is not None and recipe.residual_rank < 1:
        raise RecipeError(f"residual_rank must be at least 1, got {recipe.residual_rank}", hint="8 is a good start")


def _check_patches(recipe: Recipe) -> None:
    if recipe.patches and recipe.merge:
        raise RecipeError("patches are for adapters that swap, and merge is set", hint="leave out merge or patches")
    if recipe.patches and recipe.quantize in {"none", "fp16"}:
        raise RecipeError(
            f"patches change codes of quantized weights, and quantize is {recipe.quantize!r}",
            hint="set quantize to int8 or int4, or leave patches out",
        )


def _check_gate(recipe: Recipe) -> None:
    if recipe.max_bytes is not None and recipe.quantize != "int4":
        raise RecipeError(
            f"max_bytes is {recipe.max_bytes}, and quantize is {recipe.quantize!r}",
            hint="only int4 trades bytes for quality: set quantize to int4, or leave max_bytes out",
        )
    if recipe.max_bytes is not None and recipe.max_bytes < 1:
        raise RecipeError(f"max_bytes must be at least 1, got {recipe.max_bytes}", hint="70000000 is 70 MB")
    if recipe.max_kl is not None and recipe.max_kl < 0:
        raise RecipeError(f"max_kl must be 0 or more, got {recipe.max_kl}", hint="0.02 is strict, 0.1 is loose")
    if recipe.min_top1 is not None and not 0 <= recipe.min_top1 <= 1:
        raise RecipeError(f"min_top1 must be between 0 and 1, got {recipe.min_top1}", hint="0.95 means 95 %")
    if recipe.max_length is not None and recipe.max_length < 1:
        raise RecipeError(
            f"max_length must be at least 1, got {recipe.max_length}", hint="leave it out for the model's own limit"
        )
