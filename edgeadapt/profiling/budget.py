"""Budgets: what a figure of a profile may be at most, or must be at least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgeadapt.errors import ProfileError
from edgeadapt.profiling.catalogue import FIGURES, figure_name, text
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


def named_budgets(budgets: Mapping[str, float]) -> dict[str, float]:
    """Return budgets by their figures' names in `FIGURES`; see `catalogue.figure_name` for the ones that are accepted.

    Raises:
        ProfileError: if no profile has a figure, one is named twice, or a limit is below 0 or no number.
    """
    named: dict[str, float] = {}
    for given, limit in budgets.items():
        name = figure_name(given)
        if name in named:
            raise ProfileError(f"there are two budgets of {name}", hint="give one limit for each figure")
        if not math.isfinite(limit) or limit < 0:
            raise ProfileError(f"the budget of {name} is {limit}", hint="give a number from 0 on, in the figure's unit")
        named[name] = limit
    return named


def broken(profile: Profile, budgets: Mapping[str, float]) -> tuple[Break, ...]:
    """Return the budgets that a profile does not keep; one whose figure was not measured is not kept.

    Args:
        profile: what was measured.
        budgets: limits by figure, in its unit: the least value of figures of which more is better, the most of all
            others.

    Raises:
        ProfileError: see `named_budgets`.
    """
    limits = named_budgets(budgets)
    values = {name: value for name in limits if (value := FIGURES[name].read(profile)) is not None}
    return broken_by(values, limits)


def broken_by(values: Mapping[str, float], budgets: Mapping[str, float]) -> tuple[Break, ...]:
    """Return the named budgets that figures do not keep: `values` by name, without those that were not measured."""
    found = [Break(name, values.get(name), limit) for name, limit in budgets.items()]
    return tuple(each for each in found if not _kept(each))


def _kept(each: Break) -> bool:
    if each.value is None:
        return False
    return each.value >= each.limit if FIGURES[each.figure].more_is_better else each.value <= each.limit
