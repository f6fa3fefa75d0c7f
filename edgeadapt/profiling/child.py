"""`python -m edgeadapt.profiling.child`: one measurement in a process of its own, JSON in, JSON out."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from edgeadapt import registry
from edgeadapt.errors import EdgeAdaptError, ProfileError
from edgeadapt.fields import from_mapping

RUNTIMES = "edgeadapt.profiling.runtimes"


@dataclass(frozen=True)
class Request:
    """What the parent asks for: the arguments of `measure_speed` and `measure_memory`.

    spawned_at_s: `time.monotonic()` of the parent right before it started this process; one clock for the whole system
    """

    what: Literal["speed", "memory"]
    runtime: str
    bundle: Path
    provider: str
    threads: int
    spawned_at_s: float
    prompt_tokens: int
    new_tokens: int
    repeats: int
    batch_size: int
    adapter: str | None
    tax_adapter: str | None
    further_adapters: tuple[str, ...]


def run(request: Request) -> dict[str, Any]:
    """Return what was measured, as JSON can hold it."""
    from edgeadapt.profiling.host import NoiseMeter, host_facts
    from edgeadapt.profiling.measure import measure_memory, measure_speed
    from edgeadapt.profiling.workload import Workload

    runtime = registry.load(RUNTIMES, request.runtime, ProfileError)
    process_start_s = monotonic() - request.spawned_at_s
    runtime.require(request.provider)
    open_session = partial(runtime.open_session, request.bundle, threads=request.threads, provider=request.provider)
    workload = Workload(request.prompt_tokens, request.new_tokens, request.repeats, request.batch_size)
    if request.what == "memory":
        return asdict(measure_memory(open_session, workload, request.adapter, request.further_adapters))
    noise = NoiseMeter()
    speed = measure_speed(open_session, workload, request.adapter, request.tax_adapter)
    host = host_facts(request.runtime, runtime.version())
    return {
        "process_start_s": process_start_s,
        "speed": asdict(speed),
        "noise": asdict(noise.read()),
        "host": asdict(host),
    }


def main() -> int:
    """Read a request from stdin and write {"result": ...} or {"error": ...} to stdout, nothing else."""
    # libraries that print must not end up in the answer
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        request = from_mapping(Request, json.load(sys.stdin), "the request", ProfileError)
        reply: dict[str, Any] = {"result": run(request)}
    except EdgeAdaptError as error:
        reply = {"error": {"message": error.message, "hint": error.hint}}
    with answer:
        json.dump(reply, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
