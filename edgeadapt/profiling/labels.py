"""Names that tell profiles apart: a bundle, and whatever else differs between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgeadapt.profiling.figures import Profile

_Part = Callable[[Profile], str]
_PLACE: tuple[_Part, ...] = (
    lambda profile: profile.device.name,
    lambda profile: profile.runtime,
    lambda profile: profile.host.cpu or "an unknown processor",
)
"""Told whenever they differ."""

_DETAILS: tuple[_Part, ...] = (
    lambda profile: profile.precision,
    lambda profile: f"{profile.threads} threads",
    lambda profile: "prompts of " + ", ".join(str(count) for count in profile.workload.prompt_tokens),
    lambda profile: f"batches of {profile.workload.batch_size}",
)
"""Told where names are not different without them."""


def labels(profiles: Sequence[Profile]) -> list[str]:
    """Return a short name for each profile, all different."""
    places = [part for part in _PLACE if len({part(each) for each in profiles}) > 1]
    names = [" · ".join([each.bundle, each.adapter or "base", *(part(each) for part in places)]) for each in profiles]
    for part in _DETAILS:
        told: dict[str, set[str]] = {}
        for name, each in zip(names, profiles, strict=True):
            told.setdefault(name, set()).add(part(each))
        names = [
            f"{name} · {part(each)}" if len(told[name]) > 1 else name
            for name, each in zip(names, profiles, strict=True)
        ]
    return [
        name if names.count(name) == 1 else f"{name} #{names[: at + 1].count(name)}" for at, name in enumerate(names)
    ]


def summary(profile: Profile) -> str:
    """Return what was measured, on what, as one line."""
    version = f" {profile.runtime_version}" if profile.runtime_version else ""
    threads = "1 thread" if profile.threads == 1 else f"{profile.threads} threads"
    return f"{profile.task}, {profile.precision}, on {profile.device.title}: {profile.runtime}{version}, {threads}"


def table(profiles: Sequence[Profile]) -> list[list[str]]:
    """Return the figures of `report.rows` as rows of cells: a heading, then a column for each profile."""
    from edgeadapt.profiling.report import rows

    columns = [{row["figure"]: row["value"] for row in rows(each)} for each in profiles]
    names: list[str] = []
    for column in columns:  # each new name goes behind the one that it follows in its own column
        at = 0
        for name in column:
            if name in names:
                at = names.index(name) + 1
            else:
                names.insert(at, name)
                at += 1
    body = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    return [["figure", *labels(profiles)], *body]
