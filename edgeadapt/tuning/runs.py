"""Bundles on a runtime with a number of threads, measured in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from edgeadapt.errors import EdgeAdaptError
from edgeadapt.profiling.catalogue import FIGURES
from edgeadapt.profiling.figures import Profile
from edgeadapt.profiling.profile import Prepared
from edgeadapt.profiling.samples import percentile
from edgeadapt.progress import SILENT, Progress
from edgeadapt.tuning.candidates import Candidate
from edgeadapt.tuning.choose import Trial


@dataclass(frozen=True)
class Run:
    """A bundle on a runtime with a number of threads."""

    candidate: Candidate
    bundle: Path
    runtime: str
    threads: int

    @property
    def label(self) -> str:
        """What tells it from other runs."""
        return Trial(self.candidate.label, self.runtime, self.threads, {}).label


Ready = Callable[[Run], AbstractContextManager[Prepared]]


@dataclass
class Found:
    """What came out of a run, a profile for each round."""

    run: Run
    profiles: list[Profile]
    failure: str | None = None

    def trial(self) -> Trial:
        """Return the medians over the rounds, or the failure."""
        run = self.run
        if self.failure is not None:
            return Trial(run.candidate.label, run.runtime, run.threads, {}, failure=self.failure)
        figures = {}
        for name, figure in FIGURES.items():
            values = [value for each in self.profiles if (value := figure.read(each)) is not None]
            if values:
                figures[name] = percentile(values, 50)
        return Trial(run.candidate.label, run.runtime, run.threads, figures)

    def middle(self, objective: str) -> Profile:
        """Return the round with the median of the objective, with the memory that only the first round measures."""
        read = FIGURES[objective].read
        by_value = sorted(self.profiles, key=lambda each: read(each) or 0.0)
        return replace(by_value[(len(by_value) - 1) // 2], memory=self.profiles[0].memory)


def measured(runs: Sequence[Run], ready: Ready, rounds: int, progress: Progress) -> list[Found]:
    """Return what came out of runs that were measured in turns, in changing order.

    Args:
        runs: what is measured.
        ready: gives a run's bundle on the device.
        rounds: how often.
        progress: is told what goes on, and what fails.
    """
    found = [Found(run, []) for run in runs]
    for number in range(rounds):
        order = found if number % 2 == 0 else found[::-1]
        with progress.stage(f"round {number + 1} of {rounds}"):
            for done, each in enumerate(order):
                if each.failure is None:
                    _measure(each, ready, progress)
                progress.advance(done + 1, len(order))
    return found


def _measure(each: Found, ready: Ready, progress: Progress) -> None:
    """Measure a run once more; memory does not change, so only the first time."""
    run = each.run
    beside = () if each.profiles else ("memory",)
    try:
        with progress.stage(run.label), ready(run) as device:
            profile = device.measure(operators=False, attempts=1, progress=SILENT, beside=beside)
    except EdgeAdaptError as error:
        each.failure = error.message
        progress.note(f"{run.label}: {error.message}")
        return
    for failure in profile.failures:
        progress.note(f"{run.label}: {failure}")
    each.profiles.append(profile)
