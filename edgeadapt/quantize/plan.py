"""Which scheme each weight gets: the one asked for, its usual exceptions, and the user's own."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from edgeadapt import registry
from edgeadapt.errors import QuantizeError
from edgeadapt.quantize.scheme import SCHEMES, Scheme
from edgeadapt.quantize.weights import Weight

RAISED = "raised to 8 bits"


@dataclass(frozen=True)
class Choice:
    """The scheme of one use of one constant, and why if it is not the one asked for the whole model."""

    role: str
    weight: Weight
    scheme: str
    reason: str


def load_scheme(name: str) -> Scheme:
    """Return the scheme of that name.

    Raises:
        QuantizeError: if there is none.
    """
    return cast("Scheme", registry.load(SCHEMES, name, QuantizeError))


def choose_schemes(
    weights: Mapping[str, Sequence[Weight]], scheme: str, keep: Mapping[str, str], raised: Collection[str] = ()
) -> tuple[Choice, ...]:
    """Return the scheme of every weight.

    Args:
        weights: by graph role.
        scheme: for the whole model.
        keep: schemes by glob pattern of module paths; the first pattern that matches a path decides.
        raised: module paths that get 8 bits where they would have 4.

    Raises:
        QuantizeError: for an unknown scheme, a pattern that matches nothing, or one that asks for the impossible.
    """
    usual = load_scheme(scheme)
    exceptions = {pattern: load_scheme(name) for pattern, name in keep.items()}
    every = [(role, weight) for role, found in weights.items() for weight in found]
    _check_patterns(keep, exceptions, [weight for _, weight in every])
    return tuple(_choose(role, weight, usual, keep, raised) for role, weight in every)


def _choose(role: str, weight: Weight, usual: Scheme, keep: Mapping[str, str], raised: Collection[str]) -> Choice:
    if weight.refusal is not None:
        return Choice(role, weight, "none", weight.refusal)
    pattern = next((p for p in keep if fnmatchcase(weight.path, p)), None)
    if pattern is not None:
        return Choice(role, weight, keep[pattern], f"kept by {pattern!r}")
    name, reason = usual.usual(weight)
    if name == "int4" and weight.path in raised:
        return Choice(role, weight, "int8", RAISED)
    refusal = load_scheme(name).refuses(weight)
    return Choice(role, weight, name, reason) if refusal is None else Choice(role, weight, "none", refusal)


def _check_patterns(keep: Mapping[str, str], schemes: Mapping[str, Scheme], weights: Sequence[Weight]) -> None:
    paths = sorted({weight.path for weight in weights})
    for pattern, name in keep.items():
        matched = [weight for weight in weights if fnmatchcase(weight.path, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, paths, n=3) or paths[:3]
            raise QuantizeError(
                f"the exception {pattern!r} = {name!r} matches none of the model's {len(paths)} weights",
                hint=f"patterns are module paths with * for any text, such as {', '.join(near)}",
            )
        refused = [(w, reason) for w, reason in _refusals(schemes[pattern], matched) if reason is not None]
        if refused and name != "none":
            weight, reason = refused[0]
            raise QuantizeError(
                f"{weight.path} cannot be stored as {name!r}: {reason}",
                hint=f"leave it out of the exception {pattern!r}, or give it another scheme",
            )


def _refusals(scheme: Scheme, weights: Sequence[Weight]) -> Iterator[tuple[Weight, str | None]]:
    """Yield each weight with why the scheme cannot hold it; small weights only count if nothing else matched."""
    usable = [weight for weight in weights if weight.refusal is None]
    for weight in usable or weights:
        yield weight, weight.refusal or scheme.refuses(weight)
