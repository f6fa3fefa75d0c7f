"""`edgeadapt tune`: which export and which settings suit a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeadapt.cli import output as out
from edgeadapt.cli.options import Json, Quiet, read_budgets, read_pairs
from edgeadapt.cli.progress import reporter
from edgeadapt.errors import ProfileError

if TYPE_CHECKING:
    from edgeadapt.tuning import Trial, Tuning


def tune(
    *,
    bundles: Annotated[
        list[Path] | None, typer.Argument(metavar="[BUNDLE...]", help="Bundles to try as they are.", show_default=False)
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="See `edgeadapt list devices`; or a .toml file.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="FILE", help="A .toml file or a shipped recipe, exported with each --try."),
    ] = None,
    tries: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="KEY=A,B",
            help="Values of a recipe's key; several keys are tried in all combinations.",
            show_default="quantize=none,int8,int4 and block_size=32,64; merge=false,true for one adapter",
        ),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option("--threads", min=1, help="A number to try; again for more.", show_default="1, 2, 4, ... all"),
    ] = None,
    runtimes: Annotated[
        list[str] | None,
        typer.Option("--runtime", metavar="NAME", help="One to try; again for more.", show_default="the device's"),
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Where the device is: USER@HOST[:PORT], an adb serial, ...")
    ] = None,
    interpreter: Annotated[
        str | None, typer.Option("--interpreter", help="The Python there.", show_default="python3")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="NAME", help="The active adapter.", show_default="the first")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", metavar="FIGURE=LIMIT", help="What the pick must keep; may be given several times."),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            "--objective",
            metavar="FIGURE",
            help="What counts; again for more. The first one chooses the pick, all of them the Pareto set.",
            show_default="latency_p50_s, mean_kl, peak_resident_bytes",
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of a prompt, or of a text.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written after it.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Answers in a round; ten times as many single passes.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured, in turns.")] = 3,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for each process.", show_default="no limit")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="A folder for the pick, its recipe and all figures."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if this command made it.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Try precisions, merging, runtimes and thread counts on a device; show what no other beats, and pick one."""
    budgets = read_budgets(budget or [])

    from edgeadapt.device import read_device
    from edgeadapt.recipe import read_recipe
    from edgeadapt.tuning import OBJECTIVES, tune
    from edgeadapt.tuning.candidates import read_tries

    target = read_device(device)
    target = replace(target, address=address or target.address, interpreter=interpreter or target.interpreter)
    wanted = read_tries(read_pairs("--try", tries or [], "KEY=A,B"))
    if recipe is not None:
        from edgeadapt.merging.threads import let_threads_sleep

        let_threads_sleep()
    with reporter(quiet=quiet) as progress:
        found = tune(
            bundles or [],
            recipe=None if recipe is None else read_recipe(recipe),
            tries=wanted,
            device=target,
            runtimes=runtimes or [],
            threads=threads or [],
            adapter=adapter,
            objectives=objective or OBJECTIVES,
            budgets=budgets,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            rounds=rounds,
            timeout_s=timeout,
            output=output,
            force=force,
            progress=progress,
        )
    if json:
        out.result_json(found.to_json())
    elif not quiet:
        _show(found, output)
    _judge(found)


def _show(found: Tuning, output: Path | None) -> None:
    shown = dict.fromkeys((*found.objectives, "ttft_s", "total_bytes", "top1", *found.budgets))
    rows = [_row(trial, found, list(shown)) for trial in found.trials if trial.failure is None]
    out.table(f"{found.adapter or 'the base'} on {found.device.title}", rows)
    for trial in found.trials:
        if trial.failure is not None:
            out.warning(f"{trial.candidate}: {trial.failure}")
    for note in found.notes:
        out.warning(note)
    if found.pick is not None:
        out.text(f"pick: {found.pick.label}" + ("" if output is None else f", in {output}"))
        if found.recipe is not None and output is None:
            out.result(found.recipe, newline=False)


def _row(trial: Trial, found: Tuning, figures: list[str]) -> dict[str, Any]:
    from edgeadapt.profiling.catalogue import FIGURES, text

    is_pick = found.pick is not None and trial.label == found.pick.label
    marks = ["pick"] * is_pick + ["pareto"] * trial.pareto + ["over budget"] * bool(trial.broken)
    return {
        "candidate": trial.candidate,
        "runtime": trial.runtime if len({each.runtime for each in found.trials}) > 1 else None,
        "threads": trial.threads,
        **{
            FIGURES[name].short_title or FIGURES[name].title: text(name, trial.figures.get(name))
            for name in figures
            if _known(name, found)
        },
        "": ", ".join(marks),
    }


def _known(name: str, found: Tuning) -> bool:
    return any(name in trial.figures for trial in found.trials)


def _judge(found: Tuning) -> None:
    """Fail if nothing keeps the budgets."""
    from edgeadapt.tuning.choose import breaks, nearest

    if found.pick is not None:
        return
    close = nearest([trial for trial in found.trials if trial.failure is None], found.budgets)
    raise ProfileError(
        f"nothing that was tried keeps the budgets; the nearest is {close.label}: "
        + "; ".join(str(each) for each in breaks(close, found.budgets)),
        hint="try more settings (--try), or a larger budget",
    )
