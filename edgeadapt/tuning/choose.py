"""Which trials no other one beats, which keep the budgets, and which of those is the pick."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgeadapt.profiling.budget import Break, broken_by
from edgeadapt.profiling.catalogue import FIGURES


@dataclass(frozen=True)
class Trial:
    """A candidate with a runtime and a number of threads, as measured.

    candidate: its label; runtime, threads: see `Profile`
    figures: medians over the rounds, by name in `FIGURES`; empty if nothing could be measured
    broken: budgets that it does not keep, as clauses
    pareto: no other trial is at least as good in every objective and better in one
    failure: why there are no figures, None where there are
    """

    candidate: str
    runtime: str
    threads: int | None
    figures: Mapping[str, float]
    broken: tuple[str, ...] = ()
    pareto: bool = False
    failure: str | None = None

    @property
    def label(self) -> str:
        """What tells it from other trials."""
        return f"{self.candidate}, {self.runtime}, {self.threads} threads"


def judged(trials: Sequence[Trial], objectives: Sequence[str], budgets: Mapping[str, float]) -> list[Trial]:
    """Return the trials with what follows from their figures."""
    costs = [_costs(trial, objectives) for trial in trials]
    return [
        trial
        if trial.failure is not None
        else replace(
            trial,
            broken=tuple(str(each) for each in breaks(trial, budgets)),
            pareto=not any(_beats(other, mine) for other in costs),
        )
        for trial, mine in zip(trials, costs, strict=True)
    ]


def breaks(trial: Trial, budgets: Mapping[str, float]) -> tuple[Break, ...]:
    """Return the budgets that a trial does not keep."""
    return broken_by(trial.figures, budgets)


def pick(trials: Sequence[Trial], objectives: Sequence[str]) -> Trial | None:
    """Return the best of the trials that keep all budgets: by the first objective, then by the next ones."""
    kept = [trial for trial in trials if trial.failure is None and not trial.broken]
    return min(kept, key=lambda trial: _costs(trial, objectives), default=None)


def nearest(trials: Sequence[Trial], budgets: Mapping[str, float]) -> Trial:
    """Return the trial whose worst overrun of a budget is the smallest; `trials` are not empty."""
    return min(trials, key=lambda trial: _overrun(trial, budgets))


def _costs(trial: Trial, objectives: Sequence[str]) -> tuple[float, ...]:
    """Return the objectives as numbers of which less is better; infinite where there is none."""
    values = ((trial.figures.get(name), FIGURES[name].more_is_better) for name in objectives)
    return tuple(math.inf if value is None else -value if more else value for value, more in values)


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _overrun(trial: Trial, budgets: Mapping[str, float]) -> float:
    """Return by which factor the worst budget is missed, 1 or less if all are kept."""
    factors = []
    for name, limit in budgets.items():
        value = trial.figures.get(name)
        above, below = (limit, value) if FIGURES[name].more_is_better else (value, limit)
        factors.append(math.inf if above is None or below is None or below <= 0 else above / below)
    return max(factors, default=0.0)
