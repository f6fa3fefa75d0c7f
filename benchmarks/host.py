"""The machine that was measured on, without its name."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from edgeadapt.profiling.device_side.system import host_facts

INSTRUCTION_SETS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm",
    "sve", "bf16",
)  # fmt: skip


def describe_host() -> dict[str, Any]:
    """Processor, cores, instruction sets, caches, memory, system and the versions of what the harness itself uses."""
    facts = host_facts()
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = {word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return {
        "cpu": facts["cpu"],
        "machine": facts["machine"],
        "cores": facts["cores"],
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "last_level_cache": _last_level_cache(),
        "memory_bytes": facts["memory_bytes"],
        "gpu": facts["gpu"],
        "system": facts["system"],
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def _last_level_cache() -> str | None:
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return sizes[-1].read_text(encoding="utf-8").strip() if sizes else None
