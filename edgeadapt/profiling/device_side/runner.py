"""The program that measures: `python runner.py FOLDER MEASURE`, with job.json in the folder; prints one line of JSON.

It runs on the device that is measured, which may have no edgeadapt: stdlib, numpy and one file of `engines/` with its
runtime. MEASURE is "speed", "memory", "cold", "operators" or "checks", each in a process of its own. What is printed
is {"result": samples}, or {"error": {"message", "hint"}} with "missing" where a module is not installed there, and
"partial" with what had been measured until then.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import numpy as np

if __package__:
    from edgeadapt.profiling.device_side import system
else:  # sent to a device: the files lie side by side
    sys.path.insert(0, str(Path(__file__).parent))
    system = importlib.import_module("system")

SCHEMA = "edgeadapt.samples/1"
_RUNS_PER_REPEAT = 10
"""A single pass is repeated so often as a decoder writes one answer, for percentiles that mean something."""
_TAX_STEPS = 16
_CHECKED_STEPS = 4
_OPERATOR_STEPS = 10
_ON_GPU = ("cuda", "tensorrt")

Array = Any
Samples = dict[str, Any]


class Work:
    """What is run again and again: texts that are begun and continued, or one input of a single pass."""

    def __init__(self, engine: Any, job: dict[str, Any], tensors: dict[str, Array]) -> None:
        self.engine = engine
        self.writes = job["decoder"] is not None
        plan = job["workload"]
        self.new_tokens, self.repeats, self.batch_size = plan["new_tokens"], plan["repeats"], plan["batch_size"]
        self.prompt_tokens: list[int] = plan["prompt_tokens"] if self.writes else []
        self.inputs = {name: tensors[key] for name, key in job["inputs"].items()}
        if self.writes:
            first = job["decoder"].get("start_ids")  # behind an encoder a text begins with these, whatever was read
            self._random = np.random.default_rng(0)  # speed does not depend on which tokens are read
            self._vocab_size = job["decoder"]["vocab_size"]
            self._prompts = {
                count: np.asarray([first] * self.batch_size) if first else self._ids(count)
                for count in self.prompt_tokens
            }

    def _ids(self, count: int) -> Array:
        return self._random.integers(0, self._vocab_size, (self.batch_size, count))

    def begin(self, prompt_tokens: int) -> Array:
        """Begin a text: int64[batch, prompt_tokens] -> the next tokens, int64[batch, 1]."""
        ids = self._prompts[prompt_tokens]
        return self._next(self.engine.start(ids, ids.shape[1] + self.new_tokens))

    def go_on(self, ids: Array) -> Array:
        """Go on by one token."""
        return self._next(self.engine.step(ids))

    def once(self) -> None:
        """Run one answer, or one pass."""
        if not self.writes:
            self.engine.run(self.inputs)
            return
        ids = self.begin(self.prompt_tokens[0])
        for _ in range(self.new_tokens):
            ids = self.go_on(ids)

    def block_s(self) -> float:
        """Return the median time of some steps of a text, or of one pass."""
        if not self.writes:
            return timed(lambda: self.engine.run(self.inputs))
        ids = self.begin(self.prompt_tokens[0])
        taken = []
        for _ in range(min(_TAX_STEPS, self.new_tokens)):
            start = perf_counter()
            ids = self.go_on(ids)
            taken.append(perf_counter() - start)
        return float(np.median(taken))

    @staticmethod
    def _next(logits: Array) -> Array:
        return logits.argmax(axis=-1)[:, None]


def timed(call: Callable[[], Any]) -> float:
    """Return how long `call` takes, in seconds of wall clock."""
    start = perf_counter()
    call()
    return perf_counter() - start


def measure_speed(engine: Any, job: dict[str, Any], tensors: dict[str, Array], found: Samples) -> None:
    """Add everything that is timed to `found`, raw samples in seconds, then what the goldens say."""
    noise, use_of_system = system.NoiseMeter(), system.SystemMeter()
    active, other = job["active"], job["tax_adapter"]
    work = Work(engine, job, tensors)

    def load() -> None:
        engine.open()
        engine.use(active)

    found["load_time_s"] = timed(load)
    first = work.prompt_tokens[0] if work.writes else 0
    found["first_run_s"] = timed(lambda: work.begin(first)) if work.writes else timed(work.once)
    gpu_times = getattr(engine, "gpu_times", list)
    gpu_times()  # of the first run
    if work.writes:
        _answers(work, found)
    else:
        found["latency_s"] = [timed(work.once) for _ in range(work.repeats * _RUNS_PER_REPEAT)]
    found["gpu_s"] = gpu_times()  # of each call of the engine, in their order
    if other is not None:
        with _restored(engine, active):
            found["tax"] = _tax(engine, work, other)
        with _restored(engine, active):
            found["swap"] = _swap(engine, other, job)
    found["noise"], found["system"] = noise.read(), use_of_system.read()
    found["checks"] = measure_checks(engine, job, tensors)


def _answers(work: Work, found: Samples) -> None:
    """Time texts: the first token for each length of prompt, in turn, and the tokens after the first length."""
    ttft: dict[str, list[float]] = {str(count): [] for count in work.prompt_tokens}
    latencies: list[float] = []
    found["ttft_s"], found["latency_s"] = ttft, latencies
    for _ in range(work.repeats):
        for count in work.prompt_tokens[::-1]:  # the first length last: its text goes on
            start = perf_counter()
            ids = work.begin(count)
            now = perf_counter()
            ttft[str(count)].append(now - start)
        for _ in range(work.new_tokens):
            ids = work.go_on(ids)
            before, now = now, perf_counter()
            latencies.append(now - before)


def _tax(engine: Any, work: Work, adapter: str) -> Samples:
    """Time blocks of the base, of the adapter, and of the base with all in place for adapters, in turned order."""
    ways: dict[str, Callable[[], None]] = {
        "base_s": lambda: engine.use(None),
        "active_s": lambda: engine.use(adapter),
    }
    if hasattr(engine, "idle"):
        ways["idle_s"] = engine.idle
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for choose in ways.values():
        choose()
        work.block_s()  # warm: opens the graph and touches its memory
    for repeat in range(work.repeats * 2):
        names = list(ways)
        for name in names if repeat % 2 == 0 else names[::-1]:
            ways[name]()
            samples[name].append(work.block_s())
    return {"adapter": adapter, "idle_s": None, **samples}


def _swap(engine: Any, adapter: str, job: dict[str, Any]) -> Samples:
    """Time the call that makes an adapter active: in memory, only on disk, and as a part of a blend."""
    resident, disk, blended = [], [], []
    partner = next((name for name in job["adapters"] if name != adapter), None)
    engine.use(adapter)
    for _ in range(job["workload"]["swaps"]):
        engine.use(None)
        resident.append(timed(lambda: engine.use(adapter)))
        if hasattr(engine, "evict"):
            engine.use(None)
            engine.evict(adapter)
            disk.append(timed(lambda: engine.use(adapter)))
        if hasattr(engine, "blend") and partner is not None:
            engine.use(None)
            blended.append(timed(lambda: engine.blend({adapter: 0.5, partner: 0.5})))
            engine.use(adapter)
    return {"adapter": adapter, "resident_s": resident, "from_disk_s": disk or None, "blend_s": blended or None}


@contextmanager
def _restored(engine: Any, active: str | None) -> Iterator[None]:
    try:
        yield
    finally:
        engine.use(active)


def measure_memory(engine: Any, job: dict[str, Any], tensors: dict[str, Array], found: Samples) -> None:
    """Add this process's memory after each stage to `found`; nothing must have been opened before."""
    timeline = system.MemoryTimeline()
    stages: Samples = {"before_load": system.memory_now()}
    engine.open()
    engine.use(job["active"])
    stages["after_load"] = system.memory_now()
    work = Work(engine, job, tensors)
    work.once()
    stages["after_run"] = system.memory_now()
    if job["options"].get("provider") in _ON_GPU:
        held, told = system.gpu_memory_now(), getattr(engine, "gpu_allocator_bytes", lambda: None)()
        stages["after_run"] |= {"gpu_bytes": held, "gpu_allocator_bytes": told}
        if held is None:
            found["notes"].append("the GPU's driver does not say how much of its memory this process holds")
    stages["further_adapters"] = further = {}
    for name in job["others"]:
        engine.use(name)
        work.once()
        further[name] = system.memory_now()
    stages["timeline"] = timeline.stop()
    found["memory"] = stages


def measure_cold(engine: Any, job: dict[str, Any], _tensors: dict[str, Array], found: Samples) -> None:
    """Add the time of a load whose files the system holds nowhere in memory; None where that cannot be had.

    It counts only if as many bytes as half of the files that are opened were fetched from storage: the system need not
    forget a file that another process uses.
    """
    files = [Path(path) for path in job["options"].get("files", ())] or sorted(Path("model").rglob("*"))
    files = [path for path in files if path.is_file()]
    found["cold_load_time_s"] = None
    before = system.bytes_read_from_storage()
    if before is None or not files or not system.forget_file_cache(files):
        found["notes"].append("a cold load was not measured: this system cannot be asked to forget files")
        return

    def load() -> None:
        engine.open()
        engine.use(job["active"])

    taken = timed(load)
    fetched = (system.bytes_read_from_storage() or 0) - before
    forms = ("plain",) if job["active"] is None else ("plain", "slots", f"adapter.{job['active']}")
    unopened = {Path(path) for form, path in job["models"].items() if form not in forms}
    if fetched < sum(path.stat().st_size for path in files if path not in unopened) / 2:
        found["notes"].append(f"a cold load was not measured: only {fetched} bytes came from storage")
        return
    found["cold_load_time_s"] = taken


def measure_operators(engine: Any, job: dict[str, Any], tensors: dict[str, Array], found: Samples) -> None:
    """Add the time of each operator in one step or pass with the active adapter, None where the runtime hides it."""
    if not hasattr(engine, "operators"):
        found["operators"] = None
        found["notes"].append("this runtime does not tell the time of its operators")
        return
    engine.open()
    engine.use(job["tax_adapter"])
    work = Work(engine, job, tensors)
    if not work.writes:
        found["operators"] = engine.operators(work.once, _OPERATOR_STEPS)
        return
    ids = work.begin(work.prompt_tokens[0])
    found["operators"] = engine.operators(lambda: work.go_on(ids), min(_OPERATOR_STEPS, work.new_tokens))


def measure_checks(engine: Any, job: dict[str, Any], tensors: dict[str, Array]) -> list[Samples]:
    """Return how far this runtime's answers are from the goldens'; a text is read at once and token by token."""
    rows = []
    for check in job["checks"]:
        engine.use(check["adapter"])
        inputs = {name: tensors[key] for name, key in check["inputs"].items()}
        expected = {name: tensors[key] for name, key in check["outputs"].items()}
        if job["decoder"] is not None:
            pairs = {"logits": _text_pairs(engine, inputs["input_ids"], expected["logits"])}
        else:
            got = engine.run(inputs)
            pairs = {name: [(got[name], wanted)] for name, wanted in expected.items()}
        rows += [{"adapter": check["adapter"], "output": name, **_gap(each)} for name, each in pairs.items()]
    if job["checks"]:
        engine.use(job["active"])
    return rows


def _text_pairs(engine: Any, ids: Array, expected: Array) -> list[tuple[Array, Array]]:
    """Return the last position's logits beside the expected ones: read at once, and the last tokens one by one."""
    wanted, length = expected[:, -1], ids.shape[1]
    pairs = [(engine.start(ids, length), wanted)]
    split = max(1, length - _CHECKED_STEPS)
    if split < length:
        got = engine.start(ids[:, :split], length)
        for place in range(split, length):
            got = engine.step(ids[:, place : place + 1])
        pairs.append((got, wanted))
    return pairs


def _gap(pairs: list[tuple[Array, Array]]) -> Samples:
    for got, wanted in pairs:
        if got.shape != wanted.shape:
            raise ValueError(f"the runtime gave {list(got.shape)}, the golden has {list(wanted.shape)}")
    largest = max(float(np.abs(np.asarray(got, np.float64) - wanted).max(initial=0)) for got, wanted in pairs)
    scale = max(float(np.abs(wanted).max(initial=0)) for _, wanted in pairs) or 1.0
    tops = [bool((got.argmax(-1) == wanted.argmax(-1)).all()) for got, wanted in pairs if wanted.ndim > 1]
    finite = all(np.isfinite(got).all() for got, _ in pairs)
    if not finite:
        raise ValueError("the runtime gave NaN or infinite values")
    return {"max_abs_error": largest, "relative_error": largest / scale, "same_top1": all(tops) if tops else None}


def read_tensors(path: Path) -> dict[str, Array]:
    """Return the arrays of a .safetensors file (https://github.com/huggingface/safetensors#format)."""
    dtypes = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1", "BOOL": "?"}
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = (end + offset for offset in entry["data_offsets"])
        found[name] = np.frombuffer(data[first:last], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return found


_MEASURES: dict[str, Callable[[Any, dict[str, Any], dict[str, Array], Samples], None]] = {
    "speed": measure_speed,
    "memory": measure_memory,
    "cold": measure_cold,
    "operators": measure_operators,
}


def _checks_alone(engine: Any, job: dict[str, Any], tensors: dict[str, Array], found: Samples) -> None:
    engine.open()
    found["checks"] = measure_checks(engine, job, tensors)


_MEASURES["checks"] = _checks_alone


def run(measure: str, spawned_at_s: float | None, found: Samples) -> None:
    """Do what one process is for, in the current folder, and add it to `found`.

    Args:
        measure: one of the names in `_MEASURES`.
        spawned_at_s: `time.monotonic()` of the parent when it started this process; None on another machine.
        found: takes the samples, also those of a measurement that fails later.
    """
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    options = job["options"]
    if "source" in options:  # edgeadapt itself, on this machine
        sys.path.insert(0, options.pop("source"))
    if options.get("threads", 1) is None:
        options["threads"] = system.available_cores()
    place = "edgeadapt.profiling.device_side.engines." if __package__ else "engines."
    module = importlib.import_module(place + job["engine"])
    found.update(schema=SCHEMA, measure=measure, engine=job["engine"], notes=list(job.get("notes", ())))
    found["engine_version"] = module.version()
    found.update(machine=platform.machine(), threads=options.get("threads", 1))
    found["process_start_s"] = None if spawned_at_s is None else monotonic() - spawned_at_s
    versions = {"python": platform.python_version(), "numpy": np.__version__, job["engine"]: found["engine_version"]}
    found["host"] = {**system.host_facts(), "versions": versions}
    tensors = read_tensors(Path("tensors.safetensors"))
    engine = module.Engine(".", job, tensors)
    try:
        _MEASURES[measure](engine, job, tensors, found)
    finally:
        engine.close()


def main() -> int:
    """Answer on stdout; what libraries print goes to stderr."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    folder, measure = sys.argv[1:3]
    spawned_at_s = float(sys.argv[3]) if len(sys.argv) > 3 else None
    os.chdir(folder)
    found: Samples = {}
    try:
        run(measure, spawned_at_s, found)
        reply: Samples = {"result": found}
    except ModuleNotFoundError as error:
        reply = {"error": {"message": f"{error.name} is not installed", "hint": "", "missing": error.name}}
    except Exception as error:  # noqa: BLE001 - whatever a runtime raises must reach the other side
        message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        hint = getattr(error, "hint", None) or "check that this version of the runtime can run the model"
        reply = {"error": {"message": message, "hint": hint}, "partial": found}
    with answer:
        json.dump(reply, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
