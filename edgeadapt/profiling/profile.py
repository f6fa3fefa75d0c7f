"""A bundle's figures on a device. Each number is what its name says, or None where it was not measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from edgeadapt import registry
from edgeadapt.bundle import Bundle, open_bundle
from edgeadapt.device import Device, read_device, require_this_machine
from edgeadapt.errors import ProfileError
from edgeadapt.fields import from_mapping, to_mapping
from edgeadapt.profiling.child import RUNTIMES, Request
from edgeadapt.profiling.host import Host, Noise, available_cores
from edgeadapt.profiling.measure import MemoryStages, Speed
from edgeadapt.profiling.samples import paired_ratio, percentile
from edgeadapt.profiling.workload import Workload
from edgeadapt.runtime.spec import decoder_spec

SCHEMA = "edgeadapt.profile/1"


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk: of the whole bundle, by role of file, and by adapter (its tensors alone)."""

    total_bytes: int
    by_role_bytes: dict[str, int]
    by_adapter_bytes: dict[str, int]


@dataclass(frozen=True)
class AdapterTax:
    """What an adapter costs: `ratio` is the median of (time with it / time without) over neighbouring blocks."""

    adapter: str
    ratio: float
    base_s: tuple[float, ...]
    adapter_s: tuple[float, ...]


@dataclass(frozen=True)
class Swap:
    """From the call of `session.use` to a session that is ready, medians: adapter in memory, and only on disk."""

    adapter: str
    resident_s: float
    from_disk_s: float


@dataclass(frozen=True)
class Memory:
    """Memory of a child process that runs the bundle once with the active adapter; None where not known.

    before_load: Python and the runtime, no model; loaded: graphs open; run: after a run; peak: the most until then
    proportional_*: a page that n processes share counts as 1/n (PSS)
    further_adapters: what each further adapter adds to resident memory, in the order in which they were used; the
        first one may include a second graph
    kv_cache_bytes_per_token: what a decoder's self-attention keeps of each token of each text, by its shape
    """

    before_load_resident_bytes: int | None
    loaded_resident_bytes: int | None
    run_resident_bytes: int | None
    peak_resident_bytes: int | None
    loaded_proportional_bytes: int | None
    run_proportional_bytes: int | None
    further_adapters_resident_bytes: dict[str, int | None]
    kv_cache_bytes_per_token: int | None


@dataclass(frozen=True)
class Profile:
    """Figures of one bundle on one device.

    adapter: what was active in the main figures, None for the base
    process_start_s: from the start of a Python process until the runtime is imported, no model yet
    load_time_s: from the call to a session that is ready to run, after that
    first_run_s: the first run after loading, until the first token for models that write
    ttft_s: from the call with a prompt of token ids to the first token's logits, median
    prefill_tokens_per_s: the prompt's tokens over ttft_s; None where an encoder reads the prompt, or for a single pass
    decode_tokens_per_s: new tokens over the time of an answer's steps, median; None for a single pass
    latency_p*_s: of one new token, or of one single pass
    samples: the raw measurements in seconds, by name
    warnings: what makes the figures doubtful
    """

    schema: str
    bundle: str
    task: str
    adapter: str | None
    runtime: str
    device: Device
    threads: int
    workload: Workload
    process_start_s: float
    load_time_s: float
    first_run_s: float
    ttft_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    latency_p50_s: float
    latency_p90_s: float
    latency_p95_s: float
    latency_p99_s: float
    adapter_tax: AdapterTax | None
    swap: Swap | None
    memory: Memory
    sizes: Sizes
    host: Host
    noise: Noise
    samples: Mapping[str, tuple[float, ...]]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the profile as plain dicts, lists, strings and numbers."""
        return to_mapping(self)


def profile(
    bundle: Path | str,
    *,
    device: Device | str = "cpu",
    adapter: str | None = None,
    threads: int | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = 5,
    batch_size: int = 1,
    runtime: str = "onnxruntime",
    timeout_s: float | None = None,
) -> Profile:
    """Return how fast and how large a bundle is on this machine.

    Speed and memory are measured in two child processes, one after the other, that do nothing else.

    Args:
        bundle: a bundle's folder.
        device: a device, or its name in devices/; it must be this machine.
        adapter: what is active in the main figures, None for the base. Tax and swap are measured for it, or for the
            bundle's first adapter.
        threads: intra-op threads, None for the device's number or one per core that may be used.
        prompt_tokens: how long a prompt is (single pass: how long a text is, at most the model's longest).
        new_tokens: how many tokens are written after it.
        repeats: how many answers are written; a single pass is run ten times as often.
        batch_size: rows at once.
        runtime: one of edgeadapt/profiling/runtimes.
        timeout_s: how long each child may take, None for as long as it needs.

    Raises:
        ProfileError: if the device or the runtime cannot be used here, an argument is out of range, or a measurement
            failed.
        BundleError: if it is no bundle, or has no such adapter.
        RecipeError: if there is no such device.
    """
    chosen = read_device(device) if isinstance(device, str) else device
    require_this_machine(chosen)
    registry.load(RUNTIMES, runtime, ProfileError).require(chosen.provider)
    opened = open_bundle(bundle)
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        _check_count(name, value)
    _check_count("batch_size", batch_size)
    _check_count("threads", 1 if threads is None else threads)
    active, tax_adapter = _adapters(opened, adapter)
    request = Request(
        what="speed",
        runtime=runtime,
        bundle=opened.path.absolute(),
        provider=chosen.provider,
        threads=threads or chosen.threads or available_cores(),
        spawned_at_s=0.0,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        batch_size=batch_size,
        adapter=active,
        tax_adapter=tax_adapter,
        further_adapters=tuple(name for name in opened.adapter_names if name != active),
    )
    found = _ask(request, timeout_s)
    stages = from_mapping(MemoryStages, _ask(_for_memory(request), timeout_s), "memory", ProfileError)
    return _assemble(opened, chosen, request, found, stages)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProfileError(f"{name} is {value!r}", hint="give a whole number of 1 or more")


def _adapters(bundle: Bundle, adapter: str | None) -> tuple[str | None, str | None]:
    """Return which adapter is active, and whose tax and swap are measured."""
    merged = bundle.manifest.merged
    if merged is not None:
        if adapter not in (None, merged):
            raise ProfileError(
                f"adapter {adapter!r} cannot be used: {merged!r} is merged into the weights of this bundle",
                hint="leave --adapter out",
            )
        return merged, None
    if adapter is not None:
        bundle.adapter_record(adapter)
    first = bundle.adapter_names[0] if bundle.adapter_names else None
    return adapter, adapter or first


def _for_memory(request: Request) -> Request:
    return from_mapping(Request, to_mapping(request) | {"what": "memory"}, "request", ProfileError)


def _ask(request: Request, timeout_s: float | None) -> dict[str, Any]:
    """Run one measurement in a child process and return its result."""
    source = str(Path(__file__).parents[2])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "edgeadapt.profiling.child"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(to_mapping(request) | {"spawned_at_s": monotonic()}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=environment,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProfileError(
            f"measuring {request.what} took longer than {timeout_s} s", hint="allow more time, or fewer repeats"
        ) from error
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-5:]
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise ProfileError(
            f"the process that measured {request.what} {how}: " + " | ".join(last),
            hint="if it was killed, the machine may have too little memory; else please report this",
        )
    reply: dict[str, Any] = json.loads(done.stdout)
    if "error" in reply:
        raise ProfileError(reply["error"]["message"], hint=reply["error"]["hint"])
    result: dict[str, Any] = reply["result"]
    return result


def _assemble(
    bundle: Bundle, device: Device, request: Request, found: Mapping[str, Any], stages: MemoryStages
) -> Profile:
    speed = from_mapping(Speed, found["speed"], "speed", ProfileError)
    noise = from_mapping(Noise, found["noise"], "noise", ProfileError)
    writes = speed.ttft_s is not None
    ttft_s = percentile(speed.ttft_s, 50) if speed.ttft_s is not None else None
    p50, p90, p95, p99 = (percentile(speed.latency_s, percent) for percent in (50, 90, 95, 99))
    reads = writes and "encoder" not in bundle.manifest.graphs
    return Profile(
        schema=SCHEMA,
        bundle=bundle.manifest.name,
        task=bundle.manifest.task,
        adapter=request.adapter,
        runtime=request.runtime,
        device=device,
        threads=request.threads,
        workload=Workload(request.prompt_tokens, request.new_tokens, request.repeats, request.batch_size),
        process_start_s=found["process_start_s"],
        load_time_s=speed.load_time_s,
        first_run_s=speed.first_run_s,
        ttft_s=ttft_s,
        prefill_tokens_per_s=request.batch_size * request.prompt_tokens / ttft_s if reads and ttft_s else None,
        decode_tokens_per_s=_decode_rate(request, speed) if writes else None,
        latency_p50_s=p50,
        latency_p90_s=p90,
        latency_p95_s=p95,
        latency_p99_s=p99,
        adapter_tax=_tax(request.tax_adapter, speed),
        swap=_swap(request.tax_adapter, speed),
        memory=_memory(stages, bundle),
        sizes=_sizes(bundle),
        host=from_mapping(Host, found["host"], "host", ProfileError),
        noise=noise,
        samples={name: value for name, value in vars(speed).items() if isinstance(value, tuple)},
        warnings=_warnings(p50, p90, noise),
    )


def _decode_rate(request: Request, speed: Speed) -> float:
    count = request.new_tokens
    answers = [sum(speed.latency_s[first : first + count]) for first in range(0, len(speed.latency_s), count)]
    return request.batch_size * count / percentile(answers, 50)


def _tax(adapter: str | None, speed: Speed) -> AdapterTax | None:
    if adapter is None or speed.tax_base_s is None or speed.tax_adapter_s is None:
        return None
    ratio = paired_ratio(speed.tax_adapter_s, speed.tax_base_s)
    return AdapterTax(adapter, ratio, speed.tax_base_s, speed.tax_adapter_s)


def _swap(adapter: str | None, speed: Speed) -> Swap | None:
    if adapter is None or speed.swap_resident_s is None or speed.swap_disk_s is None:
        return None
    return Swap(adapter, percentile(speed.swap_resident_s, 50), percentile(speed.swap_disk_s, 50))


def _memory(stages: MemoryStages, bundle: Bundle) -> Memory:
    spec = decoder_spec(bundle.manifest)
    added: dict[str, int | None] = {}
    before = stages.after_run.resident_bytes
    for name, use in stages.further_adapters.items():
        now = use.resident_bytes
        added[name] = None if now is None or before is None else now - before
        before = now
    return Memory(
        before_load_resident_bytes=stages.before_load.resident_bytes,
        loaded_resident_bytes=stages.after_load.resident_bytes,
        run_resident_bytes=stages.after_run.resident_bytes,
        peak_resident_bytes=stages.after_run.peak_resident_bytes,
        loaded_proportional_bytes=stages.after_load.proportional_bytes,
        run_proportional_bytes=stages.after_run.proportional_bytes,
        further_adapters_resident_bytes=added,
        kv_cache_bytes_per_token=None if spec is None else spec.cache_bytes_per_token,
    )


def _sizes(bundle: Bundle) -> Sizes:
    roles: dict[str, int] = {}
    for record in bundle.manifest.files.values():
        roles[record.role] = roles.get(record.role, 0) + record.size
    manifest_bytes = (bundle.path / "manifest.json").stat().st_size
    adapters = {
        name: bundle.manifest.files[f"adapters/{name}/adapter.onnx_adapter"].size for name in bundle.adapter_names
    }
    return Sizes(sum(roles.values()) + manifest_bytes, dict(sorted(roles.items())), adapters)


def _warnings(p50: float, p90: float, noise: Noise) -> tuple[str, ...]:
    found = []
    if p90 > 2 * p50:
        found.append(f"latencies scatter: p90 is {p90 / p50:.1f} times p50")
    if noise.steal_ratio is not None and noise.steal_ratio > 0.02:
        found.append(f"the hypervisor took {noise.steal_ratio:.0%} of the CPU time away")
    if noise.cpu_pressure_percent is not None and noise.cpu_pressure_percent > 20:
        found.append(f"other work waited for a core {noise.cpu_pressure_percent:.0f} % of the time")
    return tuple(found)
