"""One page for a browser that loads nothing else: figures, charts, and what makes them doubtful."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from edgeadapt.profiling import sections
from edgeadapt.profiling.catalogue import FIGURES
from edgeadapt.profiling.catalogue import text as figure_text
from edgeadapt.profiling.figures import Profile
from edgeadapt.profiling.labels import labels, summary, table

_STYLE = Path(__file__).with_name("page.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TILES = (
    "decode_tokens_per_s",
    "ttft_s",
    "latency_p50_s",
    "latency_p95_s",
    "load_time_s",
    "peak_resident_bytes",
    "total_bytes",
    "adapter_tax_ratio",
    "top1",
)
"""The figures at the top of a page of one profile."""


def render(profiles: Sequence[Profile]) -> str:
    """Return the page."""
    names = labels(profiles)
    title = f"Profile of {names[0]}" if len(profiles) == 1 else f"{len(profiles)} profiles"
    body = [
        f"<h1>{escape(title)}</h1>",
        *(_about(name, each, alone=len(profiles) == 1) for name, each in zip(names, profiles, strict=True)),
        _tiles(profiles[0]) if len(profiles) == 1 else "",
        '<div class="side-by-side">',
        *(_told(name, each, alone=len(profiles) == 1) for name, each in zip(names, profiles, strict=True)),
        "</div>",
        *_sections(names, profiles),
        "<h2>All figures</h2>",
        _table(profiles),
        _noise(names, profiles),
        f"<footer>{escape(_versions(profiles))}</footer>",
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE.read_text(encoding='utf-8')}</style></head><body><main>",
            *(part for part in body if part),
            "</main></body></html>",
            "",
        ]
    )


def _about(name: str, profile: Profile, *, alone: bool) -> str:
    work = profile.workload
    parts = [summary(profile)]
    if profile.host.cpu is not None:
        parts.append(profile.host.cpu)
    if profile.prefills:
        lengths = ", ".join(str(count) for count in work.prompt_tokens)
        parts.append(f"prompts of {lengths} tokens, {work.new_tokens} new tokens, {work.repeats} answers")
    parts.append(f"batch size {work.batch_size}")
    start = "" if alone else f"<b>{escape(name)}</b>: "
    return f'<p class="soft">{start}{escape("; ".join(parts))}</p>'


def _tiles(profile: Profile) -> str:
    shown = []
    for name in _TILES:
        figure = FIGURES[name]
        value = figure.read(profile)
        if value is None:
            continue
        text = f"{value - 1:+.1%}" if name == "adapter_tax_ratio" else figure_text(name, value)
        text = f"{value:.1%}" if name == "top1" else text
        shown.append(f'<div class="tile"><b>{escape(text)}</b><span>{escape(figure.title)}</span></div>')
    return f'<div class="tiles">{"".join(shown)}</div>'


def _told(name: str, profile: Profile, *, alone: bool) -> str:
    """Return what a reader must know before believing the figures."""
    told = [*profile.warnings, *profile.notes, *(f"not measured: {failure}" for failure in profile.failures)]
    if profile.emulated:
        told.insert(0, "an emulated processor gave the answers; nothing was timed")
    if told:
        heading = "These figures are doubtful" if profile.noisy else "Read with care"
        items = "".join(f"<li>{escape(text)}</li>" for text in told)
        where = "" if alone else f": {name}"
        return f'<div class="told doubt"><h3>{escape(heading + where)}</h3><ul>{items}</ul></div>'
    if profile.noise is None or not alone:
        return ""
    return '<div class="told good"><h3>Nothing disturbed the timing</h3></div>'


def _sections(names: Sequence[str], profiles: Sequence[Profile]) -> list[str]:
    made = [
        (
            "Precision, quality and speed",
            "Lower left is better. The dashed line joins those that no other beats in both.",
            sections.pareto(names, profiles),
        ),
        (
            "Latency distribution",
            "How often a token, or a run of a model that writes none, took how long.",
            sections.latencies(names, profiles),
        ),
        (
            "Memory over time",
            "Resident memory of a process that loads the bundle, runs it once and then takes on each further adapter.",
            sections.memories(names, profiles),
        ),
        (
            "What the adapter costs",
            "Time against the bare base, median of neighbouring pairs; the line spans the middle half of them.",
            sections.taxes(names, profiles),
        ),
        (
            "Operators",
            "Median time in one step or run by type, measured in a run of its own.",
            sections.operators(names, profiles),
        ),
    ]
    made = [row for row in made if row[2]]
    if len(profiles) > 1:
        return [f'{_heading(*row[:2])}<div class="side-by-side">{"".join(row[2])}</div>' for row in made]
    columns = [f"<section>{_heading(*row[:2])}{''.join(row[2])}</section>" for row in made]
    return [f'<div class="side-by-side two">{"".join(columns)}</div>']


def _heading(heading: str, about: str) -> str:
    return f'<h2>{escape(heading)}</h2><p class="soft">{escape(about)}</p>'


def _table(profiles: Sequence[Profile]) -> str:
    head, *body = table(profiles)
    columns = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    rows = "".join(
        f'<tr><th scope="row">{escape(cells[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])}</tr>'
        for cells in body
    )
    several = " several" if len(profiles) > 1 else ""
    return f'<div class="scroll{several}"><table><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div>'


def _noise(names: Sequence[str], profiles: Sequence[Profile]) -> str:
    """Return how each try at the timed figures went."""
    rows = []
    for name, each in zip(names, profiles, strict=True):
        for number, attempt in enumerate(each.attempts, start=1):
            noise = attempt.noise
            shares = (noise.steal_ratio, noise.waiting_ratio, noise.others_ratio)
            cells = [
                f"{name}, try {number}",
                figure_text("latency_p50_s", attempt.latency_p50_s),
                *("–" if share is None else f"{share:.1%}" for share in shares),
                "–" if noise.involuntary_switches is None else str(noise.involuntary_switches),
            ]
            rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    if not rows:
        return ""
    heads = ("try", "latency p50", "taken by the hypervisor", "waited for a core", "other processes", "switches")
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table_of_tries = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    about = '<h2>Noise</h2><p class="soft">The quietest try is reported.</p>'
    return f'{about}<div class="scroll several">{table_of_tries}</div>'


def _versions(profiles: Sequence[Profile]) -> str:
    found = dict.fromkeys(f"{name} {version}" for each in profiles for name, version in each.host.versions.items())
    return "Measured with " + ", ".join(found)
