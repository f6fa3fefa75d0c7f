"""Exports, runtimes and thread counts, measured on a device in turns; the Pareto set and the pick."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeadapt.bundle import Bundle, open_bundle
from edgeadapt.device import Device, device_toml, read_device
from edgeadapt.errors import ProfileError, RecipeError
from edgeadapt.fields import to_mapping
from edgeadapt.files import canonical_json, staged_directory, write_atomically
from edgeadapt.profiling.budget import named_budgets
from edgeadapt.profiling.catalogue import FIGURES, figure_name
from edgeadapt.profiling.figures import Profile
from edgeadapt.profiling.kept_models import converts
from edgeadapt.profiling.profile import Prepared, check_count, check_device, prepared, read_workload
from edgeadapt.profiling.stored import write_profile
from edgeadapt.profiling.workload import Workload
from edgeadapt.progress import SILENT, Progress
from edgeadapt.recipe import Recipe
from edgeadapt.tuning.candidates import Candidate, candidates, recipe_toml
from edgeadapt.tuning.choose import Trial, judged, pick
from edgeadapt.tuning.exports import Exports, check_alike
from edgeadapt.tuning.runs import Run, measured

SCHEMA = "edgeadapt.tuning/1"
OBJECTIVES = ("latency_p50_s", "mean_kl", "peak_resident_bytes")
RESULT = "tuning.json"
_OWN = (RESULT, "bundles", "device.toml", "models", "profiles", "recipe.toml")
"""What is written beside the pick."""


@dataclass(frozen=True)
class Tuning:
    """What was tried, and what came out.

    adapter: the active one, None for the base; objectives: figures, the one that counts first in front
    budgets: limits by figure; trials: in the order of their candidates; pick: the best that keeps all budgets, or None
    recipe: the TOML text that makes the pick again, None where the pick was there already
    profiles: of each trial that could be measured, the middle round, by the trial's label
    notes: what a reader must know
    """

    schema: str
    device: Device
    adapter: str | None
    workload: Workload
    rounds: int
    objectives: tuple[str, ...]
    budgets: Mapping[str, float]
    trials: tuple[Trial, ...]
    pick: Trial | None
    recipe: str | None
    profiles: Mapping[str, Profile]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all but the profiles as plain dicts, lists, strings and numbers."""
        return {name: value for name, value in to_mapping(self).items() if name != "profiles"}


def tune(
    bundles: Sequence[Path | str] = (),
    *,
    recipe: Recipe | None = None,
    tries: Mapping[str, Sequence[Any]] | None = None,
    device: Device | str = "cpu",
    runtimes: Sequence[str] = (),
    threads: Sequence[int] = (),
    adapter: str | None = None,
    objectives: Sequence[str] = OBJECTIVES,
    budgets: Mapping[str, float] | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 2,
    rounds: int = 3,
    timeout_s: float | None = None,
    output: Path | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Tuning:
    """Return which bundle, runtime and number of threads suit a device best, from measuring them there in turns.

    Args:
        bundles: folders of bundles that are there; they are measured as they are.
        recipe: exported with each combination of `tries`, and each export measured. Its `output` names the pick.
        tries: values by keys of the recipe; without a key of `candidates.USUAL` its usual values are tried.
        device: a device, or its name in devices/.
        runtimes: those to try, empty for the device's own.
        threads: numbers to try, empty for 1, 2, 4, ... and all cores.
        adapter: what is active, None for the first one.
        objectives: figures (see `catalogue.figure_name`) that span the Pareto set. The first one chooses the pick.
        budgets: limits by figure, see `budget.broken`.
        prompt_tokens: see `profile`, and so are the next three.
        new_tokens: in each round.
        repeats: in each round.
        rounds: how often each is measured, in changing order; figures are medians over the rounds.
        timeout_s: how long each process may take, None for as long as it needs.
        output: a folder to make: `tuning.json`, a profile of each trial, the pick's bundle, its recipe, and a device
            file with its runtime and threads. None leaves nothing behind.
        force: replace `output` if `tune` made it.
        progress: is told what goes on.

    Raises:
        ProfileError: if the device or a runtime cannot be used, an argument is out of range, or nothing could be
            measured. What fails for one trial is in its `failure`.
        RecipeError: if there is nothing to try, or the bundles are not of one base and adapter.
        BundleError: if a folder is no bundle, or has no such adapter.
        FileError: if `output` cannot be made.
    """
    limits = named_budgets(budgets or {})
    objectives = tuple(dict.fromkeys(figure_name(each) for each in objectives))
    if not objectives:
        raise ProfileError("there is no objective", hint=f"give some of {', '.join(FIGURES)}")
    check_count("rounds", rounds)
    target = read_device(device) if isinstance(device, str) else device
    converting = {runtime for runtime in runtimes or (target.runtime,) if converts(check_device(target, runtime)[2])}
    workload = read_workload(prompt_tokens, new_tokens, repeats, 1)
    with _folder(output, force) as folder:
        wanted, active = _wanted(bundles, recipe, tries or {}, adapter)
        exports = Exports(folder / "bundles", progress)
        there = exports.bundles(wanted)
        places = [bundle for _, bundle in there]
        runs = [
            Run(candidate, bundle, runtime, count)
            for candidate, bundle in there
            for runtime in runtimes or (target.runtime,)
            for count in _threads(threads, target)
        ]

        def ready(run: Run) -> AbstractContextManager[Prepared]:
            kept = folder / "models" / f"{places.index(run.bundle)}-{run.runtime}"
            return prepared(
                run.bundle,
                workload,
                device=target,
                adapter=active,
                threads=run.threads,
                runtime=run.runtime,
                models=kept if run.runtime in converting else None,
                timeout_s=timeout_s,
                announce=None,
                progress=SILENT,
            )

        found = measured(runs, ready, rounds, progress)
        trials = judged([*exports.failed, *(each.trial() for each in found)], objectives, limits)
        if all(trial.failure is not None for trial in trials):
            raise ProfileError(f"nothing could be measured: {trials[0].failure}", hint="see the other failures above")
        best = pick(trials, objectives)
        chosen = next((each for each in found if best is not None and each.run.label == best.label), None)
        profiles = {each.run.label: each.middle(objectives[0]) for each in found if each.profiles}
        result = Tuning(
            schema=SCHEMA,
            device=target,
            adapter=active,
            workload=workload,
            rounds=rounds,
            objectives=objectives,
            budgets=limits,
            trials=tuple(trials),
            pick=best,
            recipe=None if chosen is None else _recipe_of(chosen.run.candidate, chosen.run.label),
            profiles=profiles,
            notes=_notes(wanted, profiles.values(), limits),
        )
        _keep(folder, result, None if chosen is None else chosen.run)
    return result


@contextmanager
def _folder(output: Path | None, force: bool) -> Iterator[Path]:
    """Give the folder that becomes `output`, or one that is gone afterwards."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
            yield Path(folder)
    else:
        with staged_directory(output, force=force, replaces=RESULT) as staged:
            yield staged


def _wanted(
    bundles: Sequence[Path | str], recipe: Recipe | None, tries: Mapping[str, Sequence[Any]], adapter: str | None
) -> tuple[list[Candidate], str | None]:
    """Return what is to be measured, and the active adapter."""
    if not bundles and recipe is None:
        raise RecipeError("there is nothing to tune", hint="give bundles, or a recipe (--recipe) to export in turns")
    if tries and recipe is None:
        raise RecipeError(
            f"{next(iter(tries))} is to be tried, and there is no recipe to export with it", hint="give --recipe"
        )
    opened = [open_bundle(path) for path in bundles]
    labels = _names(opened)
    there = [Candidate(label, bundle.path, None) for label, bundle in zip(labels, opened, strict=True)]
    active = adapter
    for bundle in opened:
        active = active or bundle.manifest.merged or next(iter(bundle.adapter_names), None)
        check_alike(bundle, opened[0], active)
    if recipe is None:
        return there, active
    if recipe.output.name in _OWN:
        raise RecipeError(f"the recipe's output is {recipe.output.name!r}", hint="give the bundle a name of its own")
    from edgeadapt.pipeline.inputs import named_adapters

    paths = {each.name: each.path for each in named_adapters(recipe)}
    active = active or next(iter(paths))
    if active not in paths:
        raise RecipeError(
            f"the recipe has no adapter {active!r}", hint=f"adapters of the recipe: {', '.join(sorted(paths))}"
        )
    return [*there, *candidates(recipe, tries, (active, paths[active]))], active


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """Return the bundles' names, or their paths where names occur twice."""
    names = [bundle.manifest.name for bundle in bundles]
    return names if len(set(names)) == len(names) else [str(bundle.path) for bundle in bundles]


def _threads(given: Sequence[int], device: Device) -> list[int]:
    """Return the numbers to try."""
    if given:
        for count in given:
            check_count("threads", count)
        return list(dict.fromkeys(given))
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    most = device.cores or device.threads or (here if device.transport == "local" else None) or 1
    return sorted({1 << power for power in range(most.bit_length()) if 1 << power <= most} | {most})


def _recipe_of(candidate: Candidate, label: str) -> str | None:
    return None if candidate.recipe is None else recipe_toml(candidate.recipe, f"{label}: made by edgeadapt tune")


def _notes(wanted: Sequence[Candidate], profiles: Any, budgets: Mapping[str, float]) -> tuple[str, ...]:
    every = list(profiles)
    notes = dict.fromkeys(text for candidate in wanted for text in candidate.notes)
    notes |= dict.fromkeys(text for each in every for text in each.notes)
    disturbed = sum(each.noisy for each in every)
    if disturbed:
        notes[f"{disturbed} of {len(every)} trials were disturbed by other work"] = None
    if not budgets:
        notes["no budget was given, so the pick may answer badly: see its mean KL"] = None
    return tuple(notes)


def _keep(folder: Path, result: Tuning, run: Run | None) -> None:
    """Write the result, and leave of the exported bundles only the pick."""
    write_atomically(folder / RESULT, canonical_json(result.to_json()))
    (folder / "profiles").mkdir()
    for number, (label, profile) in enumerate(result.profiles.items()):
        slug = "".join(c if c.isalnum() else "-" for c in label)
        write_profile(folder / "profiles" / f"{number:02}-{slug}.json", profile)
    if run is not None:
        kept = replace(result.device, name="device", runtime=run.runtime, threads=run.threads)
        write_atomically(folder / "device.toml", device_toml(kept).encode())
        if result.recipe is not None:
            write_atomically(folder / "recipe.toml", result.recipe.encode())
            run.bundle.rename(folder / run.bundle.name)
    for name in ("bundles", "models"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
