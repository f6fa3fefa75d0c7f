"""What was measured on, and what disturbed it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_PROC = Path("/proc")


@dataclass(frozen=True)
class Host:
    """The machine; None where it does not say.

    cores: logical cores that this process may use; memory_bytes: all memory of the machine
    gpu: name and driver of the first NVIDIA GPU; versions: of what took part, by name
    """

    cpu: str | None
    cores: int
    machine: str
    system: str
    memory_bytes: int | None
    gpu: str | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Noise:
    """What else went on while measuring; None where the system does not say.

    involuntary_switches: how often this process lost its core to another one
    steal_ratio: share of CPU time that a hypervisor took away
    cpu_pressure_percent: share of the last 10 s in which some task waited for a core (PSI), at the end
    load_average: tasks that ran or waited in the last minute, at the end
    """

    involuntary_switches: int | None
    steal_ratio: float | None
    cpu_pressure_percent: float | None
    load_average: float | None


def host_facts(runtime: str, runtime_version: str, proc: Path = _PROC) -> Host:
    """Return facts about this machine, for a profile by `runtime`."""
    from edgeadapt import __version__

    versions = {
        "edgeadapt": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        runtime: runtime_version,
    }
    return Host(
        cpu=_cpu_name(proc),
        cores=available_cores(),
        machine=platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        memory_bytes=_memory_bytes(proc),
        gpu=_gpu_name(),
        versions=versions,
    )


def available_cores() -> int:
    """Return how many logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class NoiseMeter:
    """Counts from when it is made until `read`."""

    def __init__(self, proc: Path = _PROC) -> None:
        self._proc = proc
        self._switches = _involuntary_switches()
        self._ticks = _cpu_ticks(proc)

    def read(self) -> Noise:
        """Return what happened since this meter was made."""
        switches, ticks = _involuntary_switches(), _cpu_ticks(self._proc)
        steal = None
        if ticks is not None and self._ticks is not None and ticks[0] > self._ticks[0]:
            steal = (ticks[1] - self._ticks[1]) / (ticks[0] - self._ticks[0])
        return Noise(
            involuntary_switches=None if switches is None or self._switches is None else switches - self._switches,
            steal_ratio=steal,
            cpu_pressure_percent=_pressure(self._proc),
            load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )


def _involuntary_switches() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _cpu_ticks(proc: Path) -> tuple[int, int] | None:
    """Return all ticks and stolen ticks since boot (man 5 proc_stat: the eighth number of the line "cpu")."""
    try:
        words = (proc / "stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    if len(words) < 9 or words[0] != "cpu":
        return None
    ticks = [int(word) for word in words[1:9]]  # what follows (guest) is already part of the first
    return sum(ticks), ticks[7]


def _pressure(proc: Path) -> float | None:
    try:
        line = (proc / "pressure" / "cpu").read_text().split("\n", 1)[0]
    except OSError:
        return None
    values = dict(part.split("=", 1) for part in line.split() if "=" in part)
    return float(values["avg10"]) if line.startswith("some") and "avg10" in values else None


def _cpu_name(proc: Path) -> str | None:
    try:
        text = (proc / "cpuinfo").read_text()
    except OSError:
        return platform.processor() or None
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if fields.get("model name"):
        return fields["model name"]
    if "CPU part" in fields:  # Arm
        return f"{fields.get('Model', 'Arm')}, implementer {fields.get('CPU implementer')}, part {fields['CPU part']}"
    return fields.get("Model") or platform.processor() or None


def _memory_bytes(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _gpu_name() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = found.stdout.strip().splitlines()
    return lines[0] if lines else None
