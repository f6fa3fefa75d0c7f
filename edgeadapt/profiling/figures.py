"""A bundle's figures on a device. Each number is what its name says, or None where it was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeadapt.device import Device
from edgeadapt.fields import to_mapping
from edgeadapt.profiling.workload import Workload

SCHEMA = "edgeadapt.profile/2"


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk: of the whole bundle, by role of file, and by adapter (its tensors alone).

    model_bytes: what the runtime opens, where the bundle had to be converted for it; None where it opens the bundle's
    """

    total_bytes: int
    by_role_bytes: dict[str, int]
    by_adapter_bytes: dict[str, int]
    model_bytes: int | None = None


@dataclass(frozen=True)
class Prefill:
    """Reading a prompt: from the call with its token ids to the first token's logits, median, and as a rate.

    tokens_per_s: None where an encoder reads the prompt
    """

    prompt_tokens: int
    ttft_s: float
    tokens_per_s: float | None


@dataclass(frozen=True)
class AdapterTax:
    """What an adapter costs: medians of ratios of neighbouring blocks, without it as 1.

    ratio: with it active; idle_ratio: with adapters in place and none active
    """

    adapter: str
    ratio: float
    idle_ratio: float | None


@dataclass(frozen=True)
class Swap:
    """From the call to a session that is ready, medians: adapter in memory, only on disk, or as half of a blend."""

    adapter: str
    resident_s: float
    from_disk_s: float | None
    blend_s: float | None


@dataclass(frozen=True)
class Memory:
    """Memory of a process of its own that runs the bundle once with the active adapter; None where not known.

    before_load: the runtime, no model; loaded: graphs open; run: after a run; peak: the most until then
    run_anonymous_bytes, run_file_bytes: of the resident ones, the process's own, and mapped files
    *_proportional_bytes: a page that n processes share counts as 1/n (PSS)
    further_adapters: what each further adapter adds to resident memory, in the order in which they were used; the
        first one may include a second graph
    run_gpu_bytes: on NVIDIA GPUs, as their driver counts it; None where nothing runs there, or it does not tell
    run_gpu_allocator_bytes: what the runtime's own allocator has reserved there; the driver's own share comes on top
    kv_cache_bytes_per_token: what a decoder's self-attention keeps of each token of each text, by its shape
    """

    before_load_resident_bytes: int | None
    loaded_resident_bytes: int | None
    run_resident_bytes: int | None
    peak_resident_bytes: int | None
    run_anonymous_bytes: int | None
    run_file_bytes: int | None
    loaded_proportional_bytes: int | None
    run_proportional_bytes: int | None
    further_adapters_resident_bytes: dict[str, int | None]
    kv_cache_bytes_per_token: int | None
    run_gpu_bytes: int | None = None
    run_gpu_allocator_bytes: int | None = None


@dataclass(frozen=True)
class Check:
    """How far the runtime's answer to a golden's input is from the golden.

    adapter: None for the base; relative_error: max_abs_error over the largest expected value
    same_top1: whether the likeliest token or class is the same everywhere; None where there is none
    """

    adapter: str | None
    output: str
    max_abs_error: float
    relative_error: float
    same_top1: bool | None


@dataclass(frozen=True)
class Quality:
    """How near the bundle's answers are to the unquantized model's, as measured when it was made; None where not.

    mean_kl: of its probabilities, in nats; top1: share of positions with the same likeliest token or class
    """

    mean_kl: float | None
    top1: float | None


@dataclass(frozen=True)
class OperatorTime:
    """The time of one operator in a step or pass, median; `adapter`: it is there for adapters alone."""

    name: str
    op_type: str
    seconds: float
    adapter: bool


@dataclass(frozen=True)
class Host:
    """The machine; None where it does not say.

    cores: logical cores that a process may use; memory_bytes: all memory of the machine
    gpu: name and driver of the first NVIDIA GPU; versions: of what took part, by name
    """

    cpu: str | None
    cores: int | None
    machine: str | None
    system: str | None
    memory_bytes: int | None
    gpu: str | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Noise:
    """What else went on while measuring; None where the system does not say it.

    involuntary_switches: how often the process lost its core to another one
    steal_ratio: share of CPU time that a hypervisor took away
    waiting_ratio: share of the time in which some task waited for a core (PSI)
    others_ratio: share of all cores' time that other processes used
    load_average: tasks that ran or waited in the last minute, at the end
    """

    seconds: float | None
    involuntary_switches: int | None
    steal_ratio: float | None
    waiting_ratio: float | None
    others_ratio: float | None
    load_average: float | None


@dataclass(frozen=True)
class System:
    """Energy of the processor package, clock of any core, and temperature while timing; None where not shown."""

    energy_j: float | None
    clock_hz_min: float | None
    clock_hz_max: float | None
    temperature_c_start: float | None
    temperature_c_end: float | None


@dataclass(frozen=True)
class Attempt:
    """One try at the timed figures: how noisy it was and its median latency. The quietest one is reported."""

    noise: Noise
    latency_p50_s: float
    disturbed_by: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """Figures of one bundle on one device.

    adapter: what was active in the main figures, None for the base; precision: the bundle's quantization
    runtime, runtime_version: what opened the models; emulated: an emulated processor gives answers, never times
    process_start_s: from the start of a process until the runtime is imported, no model yet
    load_time_s: from the call to a session that is ready to run, after that, the files in the system's memory;
        cold_load_time_s: the files on storage only
    first_run_s: the first run after loading, until the first token for models that write
    prefills: for each length of prompt; the first one's text goes on
    decode_tokens_per_s: new tokens over the time of an answer's steps, median; None for a single pass
    runs_per_s: rows a second of a single pass, None for models that write
    latency_p*_s: of one new token, or of one single pass
    gpu_latency_p50_s: of the same runs, on the GPU's own clock from the first thing queued to the end of the last, with
        what it waited for in between; None where nothing tells it
    operators: longest first, None where not asked for or not told
    quality: of the active adapter or the base, from the bundle's manifest; None where that says none
    noisy: also the quietest attempt was disturbed
    samples: the raw measurements in seconds, by name; memory_timeline: (seconds, resident bytes)
    warnings: what makes the figures doubtful; failures: what could not be measured, and why
    """

    schema: str
    bundle: str
    task: str
    precision: str
    adapter: str | None
    runtime: str
    runtime_version: str
    device: Device
    threads: int
    workload: Workload
    emulated: bool
    process_start_s: float | None
    load_time_s: float | None
    cold_load_time_s: float | None
    first_run_s: float | None
    prefills: tuple[Prefill, ...]
    decode_tokens_per_s: float | None
    runs_per_s: float | None
    latency_p50_s: float | None
    latency_p90_s: float | None
    latency_p95_s: float | None
    latency_p99_s: float | None
    adapter_tax: AdapterTax | None
    swap: Swap | None
    memory: Memory | None
    sizes: Sizes
    checks: tuple[Check, ...]
    quality: Quality | None
    operators: tuple[OperatorTime, ...] | None
    system: System | None
    host: Host
    noise: Noise | None
    attempts: tuple[Attempt, ...]
    noisy: bool
    samples: Mapping[str, tuple[float, ...]]
    memory_timeline: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    failures: tuple[str, ...]
    gpu_latency_p50_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token of the first length of prompt; None for a single pass."""
        return self.prefills[0].ttft_s if self.prefills else None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """The first length's tokens over its time to the first token; None where an encoder reads, or a single pass."""
        return self.prefills[0].tokens_per_s if self.prefills else None

    def to_json(self) -> dict[str, Any]:
        """Return the profile as plain dicts, lists, strings and numbers."""
        return to_mapping(self)
