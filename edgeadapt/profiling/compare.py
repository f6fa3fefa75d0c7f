"""Two bundles measured in turns, or two profiles that were written, as ratios with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.catalogue import FIGURES, Figure
from edgeadapt.profiling.figures import Profile
from edgeadapt.profiling.labels import labels
from edgeadapt.profiling.profile import check_count, prepared, read_workload
from edgeadapt.profiling.samples import percentile
from edgeadapt.profiling.transports import Invitation
from edgeadapt.progress import SILENT, Progress

Array = NDArray[np.float64]

SCHEMA = "edgeadapt.comparison/1"
FEWEST_ROUNDS = 5
"""Of rounds, and of samples for an interval: the range of five ratios holds the true median in 94 % of cases, of four
in 88 %."""

_RESAMPLES = 1000
_AT_ONCE = 100
"""As many of them lie in memory together."""
_SEED = 0


@dataclass(frozen=True)
class Ratio:
    """A figure of both.

    a, b: its values, medians over the rounds; ratio: b over a, None where a is 0
    low, high: the 95 % bootstrap interval of the ratio, None where there are fewer than five values of each
    better: whose value is better, None where the interval holds 1 or is not known
    """

    figure: str
    a: float
    b: float
    ratio: float | None
    low: float | None
    high: float | None
    better: Literal["a", "b"] | None


@dataclass(frozen=True)
class Comparison:
    """How b's figures stand to a's.

    rounds: how often both were measured, one after the other, in changing order; 0 for profiles that were written
    notes: what a reader must know
    """

    schema: str
    a: str
    b: str
    rounds: int
    ratios: tuple[Ratio, ...]
    notes: tuple[str, ...]


def compare_bundles(
    a: Path | str,
    b: Path | str,
    *,
    rounds: int = FEWEST_ROUNDS,
    device: Device | str = "cpu",
    adapter: str | None = None,
    threads: int | None = None,
    prompt_tokens: int | Sequence[int] = 128,
    new_tokens: int = 64,
    repeats: int = 1,
    batch_size: int = 1,
    runtime: str | None = None,
    models: Sequence[Path] = (),
    timeout_s: float | None = None,
    announce: Callable[[Invitation], None] | None = None,
    progress: Progress = SILENT,
) -> Comparison:
    """Return ratios of two bundles' figures, measured in turns: a b, b a, a b, ...

    What changes slowly on the machine falls on both alike, and each round gives one ratio of every figure.

    Args:
        a: a bundle's folder.
        b: another one's.
        rounds: how often each is measured, in processes of its own.
        device: as for `profile`, and so is all that follows.
        adapter: must be in both.
        threads: see `profile`.
        prompt_tokens: see `profile`.
        new_tokens: see `profile`.
        repeats: in each round.
        batch_size: see `profile`.
        runtime: see `profile`.
        models: two folders, for a and for b: see `profile`; empty to keep nothing.
        timeout_s: see `profile`.
        announce: see `profile`.
        progress: is told what goes on.

    Raises:
        ProfileError: as `profile`; if there are fewer than 5 rounds or not two folders for models; or if only one of
            the two writes text.
        BundleError: as `profile`.
        RecipeError: as `profile`.
    """
    check_count("rounds", rounds)
    if rounds < FEWEST_ROUNDS:
        raise ProfileError(f"rounds is {rounds!r}", hint=f"give a whole number of {FEWEST_ROUNDS} or more")
    if len(models) not in (0, 2):
        raise ProfileError(
            f"models for two bundles are not kept in {len(models)} folder(s)", hint="give A's folder, and again B's"
        )
    workload = read_workload(prompt_tokens, new_tokens, repeats, batch_size)
    found: tuple[list[Profile], list[Profile]] = ([], [])
    with ExitStack() as stack:
        runs = [
            stack.enter_context(
                prepared(
                    bundle,
                    workload,
                    device=device,
                    adapter=adapter,
                    threads=threads,
                    runtime=runtime,
                    models=kept,
                    timeout_s=timeout_s,
                    announce=announce,
                    progress=progress,
                )
            )
            for bundle, kept in zip((a, b), models or (None, None), strict=True)
        ]
        for number in range(rounds):
            with progress.stage(f"round {number + 1} of {rounds}"):
                for which in (0, 1) if number % 2 == 0 else (1, 0):
                    run = runs[which].measure(operators=False, attempts=1, progress=progress, beside=("memory",))
                    found[which].append(run)
            _check_alike(found[0][0], found[1][0])
    ratios = [_paired(name, figure, *found) for name, figure in FIGURES.items()]
    places = (str(a), str(b)) if Path(a) != Path(b) else ("first", "second")
    names = _names(found[0][0], found[1][0], *places)
    return Comparison(SCHEMA, *names, rounds, _given(ratios), _notes_of(found))


def compare_profiles(a: Profile, b: Profile) -> Comparison:
    """Return ratios of two profiles' figures; intervals come from their raw samples, where a figure has some.

    Raises:
        ProfileError: if they were measured with different workloads, or only one of the two writes text.
    """
    _check_alike(a, b)
    if a.workload != b.workload:
        raise ProfileError(
            f"the workloads differ: {a.workload} and {b.workload}",
            hint="measure both with the same --prompt-tokens, --new-tokens, --repeats and --batch-size",
        )
    notes = [
        "not measured in turns: what changed on the machine in between is in the ratios, and intervals do not know it"
    ]
    for what, one, other in (
        ("devices", a.device.name, b.device.name),
        ("processors", a.host.cpu, b.host.cpu),
        ("runtimes", f"{a.runtime} {a.runtime_version}", f"{b.runtime} {b.runtime_version}"),
        ("threads", a.threads, b.threads),
    ):
        if one != other:
            notes.append(f"the {what} differ: {one} and {other}")
    notes += [f"{name} was disturbed: {'; '.join(each.warnings)}" for name, each in (("a", a), ("b", b)) if each.noisy]
    ratios = [_unpaired(name, figure, a, b) for name, figure in FIGURES.items()]
    return Comparison(SCHEMA, *_names(a, b, "first", "second"), 0, _given(ratios), tuple(notes))


def _paired(name: str, figure: Figure, a: Sequence[Profile], b: Sequence[Profile]) -> Ratio | None:
    both = [(figure.read(one), figure.read(other)) for one, other in zip(a, b, strict=True)]
    pairs = [(one, other) for one, other in both if one is not None and other is not None]
    if not pairs:
        return None
    one, other = (percentile(column, 50) for column in zip(*pairs, strict=True))
    if any(below == 0 for below, _ in pairs):
        return Ratio(name, one, other, None, None, None, None)
    ratios = [above / below for below, above in pairs]
    if len(ratios) < FEWEST_ROUNDS:
        return Ratio(name, one, other, percentile(ratios, 50), None, None, None)
    low, high = _interval(lambda drawn: np.median(drawn(ratios), axis=-1))
    return Ratio(name, one, other, percentile(ratios, 50), low, high, _better(figure, low, high))


def _unpaired(name: str, figure: Figure, a: Profile, b: Profile) -> Ratio | None:
    one, other = figure.read(a), figure.read(b)
    if one is None or other is None:
        return None
    ratio = None if one == 0 else other / one
    samples = [figure.samples(each) if figure.samples is not None else None for each in (a, b)]
    statistic, first, second = figure.statistic, *samples
    if ratio is None or statistic is None or not first or not second or min(len(first), len(second)) < FEWEST_ROUNDS:
        return Ratio(name, one, other, ratio, None, None, None)

    low, high = _interval(lambda drawn: statistic(drawn(second)) / statistic(drawn(first)))
    return Ratio(name, one, other, ratio, low, high, _better(figure, low, high))


def _interval(again: Callable[[Callable[[Sequence[float]], Array]], Array]) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile of what resampling gives (Efron, 1979: the percentile bootstrap).

    Args:
        again: gets what draws float64[times, samples] of some samples, and returns float64[times].
    """
    rng = np.random.default_rng(_SEED)

    def drawn(samples: Sequence[float]) -> Array:
        return rng.choice(np.asarray(samples, np.float64), (_AT_ONCE, len(samples)))

    found = np.concatenate([again(drawn) for _ in range(_RESAMPLES // _AT_ONCE)]).tolist()
    return percentile(found, 2.5), percentile(found, 97.5)


def _better(figure: Figure, low: float, high: float) -> Literal["a", "b"] | None:
    if low <= 1 <= high:
        return None
    return "b" if (low > 1) == figure.more_is_better else "a"


def _check_alike(a: Profile, b: Profile) -> None:
    if bool(a.prefills) != bool(b.prefills):
        raise ProfileError(
            f"the tasks {a.task!r} and {b.task!r} cannot be compared: only one of them writes text",
            hint="compare bundles of one task",
        )


def _names(a: Profile, b: Profile, first: str, second: str) -> tuple[str, str]:
    """Return names that tell the two apart."""
    if (a.bundle, a.adapter) == (b.bundle, b.adapter) and labels([a, b])[0].endswith("#1"):
        return f"{a.bundle} ({first})", f"{b.bundle} ({second})"
    one, other = labels([a, b])
    return one, other


def _given(ratios: Sequence[Ratio | None]) -> tuple[Ratio, ...]:
    return tuple(each for each in ratios if each is not None)


def _notes_of(found: tuple[list[Profile], list[Profile]]) -> tuple[str, ...]:
    every = [each for profiles in found for each in profiles]
    notes = dict.fromkeys(text for each in every for text in each.notes)
    disturbed = sum(each.noisy for each in every)
    if disturbed:
        notes[f"{disturbed} of {len(every)} measurements were disturbed by other work"] = None
    notes |= dict.fromkeys(f"not measured: {failure}" for each in every for failure in each.failures)
    return tuple(notes)
