"""Operators as trace events for chrome://tracing and Perfetto, a process for each profile.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, "Trace Event Format"
A profile keeps each operator's median time, not when it ran: operators stand one behind the other, longest first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from edgeadapt.errors import ProfileError
from edgeadapt.profiling.figures import OperatorTime, Profile
from edgeadapt.profiling.labels import labels

_THREADS = ("of the base", "of adapters")


def render(profiles: Sequence[Profile]) -> str:
    """Return the trace.

    Raises:
        ProfileError: if a profile has no operators.
    """
    names = labels(profiles)
    events: list[dict[str, Any]] = []
    for process, (name, each) in enumerate(zip(names, profiles, strict=True), start=1):
        if not each.operators:
            raise ProfileError(
                f"the profile {name!r} has no times of operators", hint="measure with `edgeadapt profile --operators`"
            )
        events.append(_named("process_name", process, 0, name))
        events += [_named("thread_name", process, thread, text) for thread, text in enumerate(_THREADS)]
        events += _operators(each.operators, process)
    note = "median times, one operator behind the other, longest first: not the order in which they ran"
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"note": note}}, indent=1) + "\n"


def _operators(operators: Sequence[OperatorTime], process: int) -> list[dict[str, Any]]:
    events, start_us = [], 0.0
    for each in operators:
        duration_us = each.seconds * 1e6
        events.append(
            {
                "name": each.name,
                "cat": each.op_type,
                "ph": "X",
                "ts": start_us,
                "dur": duration_us,
                "pid": process,
                "tid": int(each.adapter),
                "args": {"op_type": each.op_type},
            }
        )
        start_us += duration_us
    return events


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
