"""The exports that are tried: a recipe with some of its settings replaced."""

from __future__ import annotations

import dataclasses
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeadapt import settings
from edgeadapt.errors import RecipeError
from edgeadapt.fields import from_mapping, to_mapping
from edgeadapt.recipe import Recipe

TRIED = (
    "quantize", "block_size", "merge", "merge_base", "kv_cache", "max_bytes", "max_kl", "prune_kl", "adapter_dtype",
    "residual_rank",
)  # fmt: skip
"""Settings of a recipe that make another bundle of the same adapters."""

USUAL: Mapping[str, tuple[Any, ...]] = {"quantize": ("none", "int8", "int4"), "block_size": (32, 64)}
_ALONE = {"merge": (False, True)}
"""Tried too where the recipe holds one adapter: a merged bundle cannot swap."""

_DEPENDENT = ("block_size", "keep", "max_bytes", "residual_rank", "patches", "prune_kl", "adapter_dtype", "merge_base")
"""Settings that a scheme or a merge may contradict, and that are then left out."""


@dataclass(frozen=True)
class Candidate:
    """A bundle that may be the pick.

    label: what tells it from the others; bundle: a folder that is there already, None for one to export
    recipe: what to export, None for a bundle that is there; notes: settings of the recipe that it leaves out
    """

    label: str
    bundle: Path | None
    recipe: Recipe | None
    notes: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The label as a part of a file's name."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.label).strip("-")


def read_tries(pairs: Mapping[str, str]) -> dict[str, tuple[Any, ...]]:
    """Return "KEY=VALUE,VALUE" as values by a recipe's key, each as TOML writes it; a text that is no TOML is a string.

    Raises:
        RecipeError: if a key is none that can be tried.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for key, text in pairs.items():
        if key not in TRIED:
            raise RecipeError(f"{key!r} is nothing to try", hint=f"settings that can be tried: {', '.join(TRIED)}")
        found[key] = tuple(_value(item) for item in text.split(","))
    return found


def candidates(recipe: Recipe, tries: Mapping[str, Sequence[Any]], adapter: tuple[str, Path]) -> list[Candidate]:
    """Return all exports with each combination of the tried values, each once.

    A setting that a combination contradicts (blocks where nothing is quantized) is left out of it.

    Args:
        recipe: all other settings.
        tries: values by the recipe's keys; they replace the usual ones of the same key.
        adapter: the one that a merged export takes: its name and path.

    Raises:
        RecipeError: if a value is of a wrong type, or no combination is left.
    """
    whole = {**USUAL, **(_ALONE if len(recipe.adapters) == 1 else {}), **tries}
    found: dict[str, Candidate] = {}
    refused: dict[tuple[str, Any], RecipeError] = {}
    for combination in _combinations(whole):
        wanted = {**to_mapping(recipe), **combination}
        if wanted["merge"]:
            wanted |= {"names": [adapter[0]], "adapters": [str(adapter[1])]}
        try:
            made, left_out = _without_contradictions(wanted)
        except RecipeError as error:
            left_out = dict.fromkeys(combination, error)
        else:
            label = _label(made, whole)
            found.setdefault(label, Candidate(label, None, made, _notes(label, left_out, recipe, whole)))
        refused |= {(key, combination[key]): error for key, error in left_out.items() if key in combination}
    for key, values in tries.items():
        for value in values:
            if not any(getattr(each.recipe, key) == value for each in found.values()):
                raise refused[key, value]
    return list(found.values())


def _notes(
    label: str, left_out: Mapping[str, RecipeError], recipe: Recipe, whole: Mapping[str, Sequence[Any]]
) -> tuple[str, ...]:
    """Return which settings of the recipe itself a candidate does without."""
    defaults = _defaults()
    own = [key for key in left_out if key not in whole and getattr(recipe, key) != defaults[key]]
    return tuple(f"{label}: without {key}, which contradicts it" for key in own)


def recipe_toml(recipe: Recipe, comment: str) -> str:
    """Return a recipe's file: what is not as by default, with paths that hold wherever the file lies."""
    values: dict[str, Any] = {}
    for name, default in _defaults().items():
        value = getattr(recipe, name)
        if value != default and name != "force":
            values[name] = value
    values["adapters"] = [str(path.resolve()) for path in recipe.adapters]
    values["output"] = recipe.output.name
    if recipe.base is not None and Path(recipe.base).exists():
        values["base"] = str(Path(recipe.base).resolve())
    if recipe.calibrate is not None:
        values["calibrate"] = str(recipe.calibrate.resolve())
    return settings.to_toml(values, comment)


def _defaults() -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(Recipe)
    }


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _combinations(whole: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*whole.values()):
        yield dict(zip(whole, values, strict=True))


def _without_contradictions(wanted: dict[str, Any]) -> tuple[Recipe, dict[str, RecipeError]]:
    """Return a recipe, and the settings that it had to do without, with the reason.

    Raises:
        RecipeError: if leaving settings out does not help.
    """
    left_out: dict[str, RecipeError] = {}
    while True:
        try:
            return _read(wanted), left_out
        except RecipeError as error:
            key = next((key for key in _DEPENDENT if key in wanted and _is_cause(wanted, key, error)), None)
            if key is None:
                raise
            left_out[key] = error
            wanted = _less(wanted, key)


def _is_cause(wanted: dict[str, Any], key: str, error: RecipeError) -> bool:
    try:
        _read(_less(wanted, key))
    except RecipeError as other:
        return other.message != error.message
    return True


def _less(wanted: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in wanted.items() if name != key}


def _read(wanted: dict[str, Any]) -> Recipe:
    return from_mapping(Recipe, wanted, "a candidate", RecipeError)


def _label(recipe: Recipe, whole: Mapping[str, Sequence[Any]]) -> str:
    """Return the scheme, and the other tried settings as far as they are not the default."""
    defaults = _defaults()
    words = [recipe.quantize]
    for key in whole:
        value = getattr(recipe, key)
        if key != "quantize" and value not in (defaults[key], *((32,) if key == "block_size" else ())):
            words.append(key if value is True else f"{key}={value}")
    return " ".join(words)
