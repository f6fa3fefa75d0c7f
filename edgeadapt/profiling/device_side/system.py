"""What the operating system says of this machine, of this process, and of what disturbs it: stdlib only.

Every figure is None where the system does not say it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic
from typing import Any

PROC = Path("/proc")
SYS = Path("/sys")
_SAMPLE_EVERY_S = 0.02


def host_facts(proc: Path = PROC) -> dict[str, Any]:
    """Return facts about this machine: `cpu`, `cores`, `machine`, `system`, `memory_bytes`, `gpu`."""
    return {
        "cpu": _cpu_name(proc),
        "cores": available_cores(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "memory_bytes": _table(proc / "meminfo").get("MemTotal"),
        "gpu": _gpu_name(),
    }


def available_cores() -> int:
    """Return how many logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory_bytes(proc: Path = PROC) -> int | None:
    """Return how much memory a process could still get without swapping."""
    return _table(proc / "meminfo").get("MemAvailable")


def memory_now(process: Path = PROC / "self") -> dict[str, int | None]:
    """Return a process's memory in bytes (`process`: its folder in /proc).

    `resident_bytes`, `peak_resident_bytes`; of the resident ones `anonymous_bytes` (its own) and `file_bytes` (mapped
    files and shared memory); `proportional_bytes`: a page that n processes share counts as 1/n (PSS).
    """
    status = _table(process / "status")
    shared, peak = status.get("RssShmem", 0), status.get("VmHWM")
    return {
        "resident_bytes": status.get("VmRSS"),
        "peak_resident_bytes": _peak_by_rusage() if peak is None and process == PROC / "self" else peak,
        "proportional_bytes": _table(process / "smaps_rollup").get("Pss"),
        "anonymous_bytes": status.get("RssAnon"),
        "file_bytes": status["RssFile"] + shared if "RssFile" in status else None,
    }


def gpu_memory_now(process: int | None = None) -> int | None:
    """Return the bytes that a process (this one) holds on all NVIDIA GPUs, as their driver says: by NVML or nvidia-smi.

    None where it does not say, as in a container whose processes have other numbers outside.
    """
    wanted = os.getpid() if process is None else process
    rows = _nvml_processes()
    if rows is None:
        rows = _smi_processes()
    held = [used for number, used in rows if number == wanted]
    return None if not held or None in held else sum(used for used in held if used is not None)


def _nvml_processes() -> list[tuple[int, int | None]] | None:
    """Return number and bytes of each process that computes on a GPU; None without nvidia-ml-py or its library."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            gpus = [pynvml.nvmlDeviceGetHandleByIndex(place) for place in range(pynvml.nvmlDeviceGetCount())]
            running = [each for gpu in gpus for each in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)]
            return [(each.pid, each.usedGpuMemory) for each in running]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _smi_processes() -> list[tuple[int, int | None]]:
    answer = _ask_driver("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    rows = [[word.strip() for word in line.split(",")] for line in (answer or "").splitlines()]
    return [
        (int(row[0]), int(row[1]) * 2**20 if row[1].isdecimal() else None)
        for row in rows
        if len(row) == 2 and row[0].isdecimal()
    ]


class MemoryTimeline:
    """Resident memory of this process, read every 20 ms by a thread of its own until `stop`."""

    def __init__(self, process: Path = PROC / "self") -> None:
        self._process = process
        self._samples: list[tuple[float, int]] = []
        self._end = threading.Event()
        self._start = monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> list[tuple[float, int]]:
        """Return pairs of seconds since the beginning and bytes; none where the system does not say them."""
        self._end.set()
        self._thread.join()
        return self._samples

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
        while True:
            try:
                pages = int((self._process / "statm").read_text().split()[1])
            except OSError:
                return
            self._samples.append((round(monotonic() - self._start, 3), pages * page))
            if self._end.wait(_SAMPLE_EVERY_S):
                return


class NoiseMeter:
    """Counts from when it is made until `read`."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._start = monotonic()
        self._switches, self._ticks, self._stall = _involuntary_switches(), _cpu_ticks(proc), _stall_s(proc)
        self._own = _own_ticks()

    def read(self) -> dict[str, Any]:
        """Return what happened since this meter was made.

        `seconds`; `involuntary_switches`: how often this process lost its core to another one; `steal_ratio`: share of
        CPU time that a hypervisor took away; `waiting_ratio`: share of the time in which some task waited for a core
        (PSI); `others_ratio`: share of all cores' time that other processes used; `load_average`: tasks that ran or
        waited in the last minute, at the end.
        """
        seconds = monotonic() - self._start
        switches, ticks, stall = _involuntary_switches(), _cpu_ticks(self._proc), _stall_s(self._proc)
        steal = others = None
        if ticks is not None and self._ticks is not None and ticks["all"] > self._ticks["all"]:
            passed = {name: ticks[name] - self._ticks[name] for name in ticks}
            steal = passed["steal"] / passed["all"]
            others = max(0.0, passed["busy"] - (_own_ticks() - self._own)) / passed["all"]
        return {
            "seconds": seconds,
            "involuntary_switches": None if switches is None or self._switches is None else switches - self._switches,
            "steal_ratio": steal,
            "waiting_ratio": None if stall is None or self._stall is None else (stall - self._stall) / seconds,
            "others_ratio": others,
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        }


class SystemMeter:
    """Energy, clock and temperature from when it is made until `read`."""

    def __init__(self, sys_folder: Path = SYS) -> None:
        self._sys = sys_folder
        self._energy = _energy_j(sys_folder)
        self._temperature = _temperature_c(sys_folder)
        self._clocks = _clocks_hz(sys_folder)

    def read(self) -> dict[str, float | None]:
        """Return what happened since this meter was made.

        `energy_j`: of the whole processor package (RAPL); `clock_hz_min`, `clock_hz_max`: of any core at the beginning
        or the end; `temperature_c_start`, `temperature_c_end`: of the hottest zone.
        """
        energy = _energy_j(self._sys)
        used = None if energy is None or self._energy is None else energy - self._energy
        clocks = self._clocks + _clocks_hz(self._sys)
        return {
            "energy_j": used if used is None or used >= 0 else None,  # the counter began anew
            "clock_hz_min": min(clocks, default=None),
            "clock_hz_max": max(clocks, default=None),
            "temperature_c_start": self._temperature,
            "temperature_c_end": _temperature_c(self._sys),
        }


def forget_file_cache(files: list[Path]) -> bool:
    """Ask the system to drop what it keeps of files in memory; return whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what was written just now and is nowhere else is not dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def bytes_read_from_storage(proc: Path = PROC) -> int | None:
    """Return how many bytes this process has had fetched from storage so far (man 5 proc_pid_io)."""
    try:
        lines = (proc / "self" / "io").read_text().splitlines()
    except OSError:
        return None
    found = dict(line.split(": ", 1) for line in lines if ": " in line)
    return int(found["read_bytes"]) if "read_bytes" in found else None


def _table(path: Path) -> dict[str, int]:
    """Return the "Name:  123 kB" lines of a file in /proc in bytes, {} where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found


def _peak_by_rusage() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _involuntary_switches() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _cpu_ticks(proc: Path) -> dict[str, int] | None:
    """Return ticks since boot (man 5 proc_stat, line "cpu": user nice system idle iowait irq softirq steal)."""
    try:
        words = (proc / "stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    if len(words) < 9 or words[0] != "cpu":
        return None
    ticks = [int(word) for word in words[1:9]]  # what follows (guest) is already part of the first
    return {"all": sum(ticks), "steal": ticks[7], "busy": sum(ticks) - ticks[3] - ticks[4] - ticks[7]}


def _own_ticks() -> float:
    """Return this process's CPU time in clock ticks."""
    times = os.times()
    return (times.user + times.system) * (os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100)


def _stall_s(proc: Path) -> float | None:
    """Return for how long some task has waited for a core since boot (PSI, "some ... total=", in microseconds)."""
    try:
        line = (proc / "pressure" / "cpu").read_text().split("\n", 1)[0]
    except OSError:
        return None
    values = dict(part.split("=", 1) for part in line.split() if "=" in part)
    return int(values["total"]) / 1e6 if line.startswith("some") and "total" in values else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _energy_j(sys_folder: Path) -> float | None:
    found = [_number(path) for path in sorted(sys_folder.glob("class/powercap/intel-rapl:[0-9]/energy_uj"))]
    known = [value for value in found if value is not None]
    return sum(known) / 1e6 if known else None


def _clocks_hz(sys_folder: Path) -> list[float]:
    found = [_number(path) for path in sys_folder.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    return [value * 1e3 for value in found if value is not None]


def _temperature_c(sys_folder: Path) -> float | None:
    found = [_number(path) for path in sys_folder.glob("class/thermal/thermal_zone*/temp")]
    return max((value / 1e3 for value in found if value is not None), default=None)


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


def _gpu_name() -> str | None:
    lines = (_ask_driver("--query-gpu=name,driver_version", "--format=csv,noheader") or "").splitlines()
    return lines[0] if lines else None


def _ask_driver(*arguments: str) -> str | None:
    """Return what nvidia-smi answers, None where there is none or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        found = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
