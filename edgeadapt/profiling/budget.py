"""Budgets: what a figure of a profile may be at most, or must be at least."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgeadapt.errors import ProfileError
from edgeadapt.profiling.catalogue import FIGURES, text
from edgeadapt.profiling.figures import Profile


@dataclass(frozen=True)
class Break:
    """A budget that a profile does not keep; value: None where the figure was not measured."""

    figure: str
    value: float | None
    limit: float

    def __str__(self) -> str:
        """Return the figure, its value and the limit as one clause."""
        bound = "least" if FIGURES[self.figure].more_is_better else "most"
        told = "was not measured" if self.value is None else f"is {text(self.figure, self.value)} ({self.value:.6g})"
        return f"{self.figure} {told}, the budget is at {bound} {text(self.figure, self.limit)} ({self.limit:.6g})"


def check_budgets(budgets: Mapping[str, float]) -> None:
    """Refuse budgets of figures that no profile has, and limits that no figure can be: below 0, or no number.

    Raises:
        ProfileError: naming the figure, with the known ones.
    """
    for name, limit in budgets.items():
        if name not in FIGURES:
            known = {_words(figure): figure for figure in FIGURES}
            close = difflib.get_close_matches(_words(name), known, n=1)
            meant = f"did you mean {known[close[0]]!r}? " if close else ""
            raise ProfileError(f"a profile has no figure {name!r}", hint=f"{meant}known figures: {', '.join(FIGURES)}")
        if not math.isfinite(limit) or limit < 0:
            raise ProfileError(f"the budget of {name} is {limit}", hint="give a number from 0 on, in the figure's unit")


def _words(name: str) -> str:
    """Return a name with its words in one order, so that p95_latency_s is near latency_p95_s."""
    return "_".join(sorted(name.lower().split("_")))


def broken(profile: Profile, budgets: Mapping[str, float]) -> tuple[Break, ...]:
    """Return the budgets that a profile does not keep; one whose figure was not measured is not kept.

    Args:
        profile: what was measured.
        budgets: limits by name in `FIGURES`, in the figure's unit: the least value of figures of which more is
            better, the most of all others.

    Raises:
        ProfileError: see `check_budgets`.
    """
    check_budgets(budgets)
    values = {name: value for name in budgets if (value := FIGURES[name].read(profile)) is not None}
    return broken_by(values, budgets)


def broken_by(values: Mapping[str, float], budgets: Mapping[str, float]) -> tuple[Break, ...]:
    """Return the checked budgets that figures do not keep: `values` by name, without those that were not measured."""
    found = [Break(name, values.get(name), limit) for name, limit in budgets.items()]
    return tuple(each for each in found if not _kept(each))


def _kept(each: Break) -> bool:
    if each.value is None:
        return False
    return each.value >= each.limit if FIGURES[each.figure].more_is_better else each.value <= each.limit
