"""ONNX Runtime alone, as an app binds it: adapters as plain inputs, a key-value cache that is updated in place."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ._not_started import NotStartedError

Array = Any

_PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
_MISSING = {
    "cuda": 'pip install "onnxruntime-gpu[cuda,cudnn]", or put the CUDA libraries on LD_LIBRARY_PATH',
    "tensorrt": 'pip install tensorrt-cu12 "onnxruntime-gpu[cuda,cudnn]", or put their libraries on LD_LIBRARY_PATH',
}
_OPTIONS = ("provider", "threads")


def version() -> str:
    """Return ONNX Runtime's version."""
    return str(ort.__version__)


class Engine:
    """The graphs of a job; `provider` is one of `_PROVIDERS`, `threads` those inside an operator."""

    def __init__(self, folder: str, job: dict[str, Any], tensors: dict[str, Array]) -> None:
        unknown = sorted(set(job["options"]) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r} of the engine onnxruntime")
        self._folder, self._job, self._tensors = Path(folder), job, tensors
        self._provider, self._threads = job["options"]["provider"], job["options"]["threads"]
        self._device = "cpu" if self._provider == "cpu" else "cuda"
        if self._device == "cuda":
            _find_libraries(self._provider)
        self._sessions: dict[str, Any] = {}
        self._resident: dict[str, dict[str, Any]] = {}
        self._graph = "plain"
        self._fed: dict[str, Any] = {}
        self._binding: Any = None
        self._cache: dict[str, Any] = {}
        self._past = 0
        self._borrowed: list[Array] = []

    def open(self) -> None:
        """Open the plain graph."""
        self._session("plain")

    def use(self, adapter: str | None) -> None:
        """Have an adapter's tensors fed; the base runs in the plain graph."""
        if adapter is not None and adapter not in self._resident:
            names = self._job["adapters"][adapter]
            self._resident[adapter] = {name: self._value(self._tensors[key]) for name, key in names.items()}
        self._make_ready("plain" if adapter is None else "slots", {} if adapter is None else self._resident[adapter])

    def idle(self) -> None:
        """Run the base in the graph that takes adapters, with none fed."""
        self._make_ready("slots" if "slots" in self._job["models"] else "plain", {})

    def _make_ready(self, graph: str, fed: dict[str, Any]) -> None:
        self._graph, self._fed, self._binding = graph, fed, None
        self._session(graph)
        if self._cache:
            self._bound()

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run a single pass."""
        session = self._session(self._graph)
        names = [output.name for output in session.get_outputs() if output.name in self._job["answers"]]
        fed = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()}
        values = session.run_with_ort_values(names, fed | self._fed)
        return dict(zip(names, (value.numpy() for value in values), strict=True))

    def start(self, ids: Array, capacity: int) -> Array:
        """Begin a text; see `engines`."""
        decoder = self._job["decoder"]
        rows = len(ids)
        shape = [rows, decoder["heads"], capacity, decoder["head_dim"]]
        if not self._cache or self._cache["shape"] != shape:
            zeros = np.zeros(shape, decoder["dtype"])
            names = [(pair["past"], pair["present"]) for pair in decoder["cache"]]
            self._cache = {"shape": shape, "names": names, "values": [self._value(zeros.copy()) for _ in names]}
            self._binding = None
        self._past = 0
        return self._read(ids)

    def step(self, ids: Array) -> Array:
        """Go on by one token; see `engines`."""
        return self._read(ids)

    def _read(self, ids: Array) -> Array:
        rows, width = ids.shape
        total = self._past + width
        binding = self._bound()
        fed = {"input_ids": np.ascontiguousarray(ids, np.int64), "attention_mask": np.ones((rows, total), np.int64)}
        if self._job["decoder"]["logits_from"]:
            fed["logits_from"] = np.asarray([width - 1], np.int64)
        for name, array in fed.items():  # `fed` lives until the run is over: what is bound borrows its memory
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_output("logits", "cpu")
        self._session(self._graph).run_with_iobinding(binding)
        self._past = total
        return binding.get_outputs()[0].numpy()[:, -1]

    def _bound(self) -> Any:
        """Return a binding of the cache and of what is fed; made anew only when either changed."""
        if self._binding is None:
            self._binding = self._session(self._graph).io_binding()
            self._binding.bind_output("logits", "cpu")  # the first output stays the first
            for name, value in self._fed.items():
                self._binding.bind_ortvalue_input(name, value)
            for (past, present), value in zip(self._cache["names"], self._cache["values"], strict=True):
                self._binding.bind_ortvalue_input(past, value)
                self._binding.bind_ortvalue_output(present, value)
        return self._binding

    def operators(self, once: Callable[[], Any], steps: int) -> list[dict[str, Any]]:
        """Return the time of each operator in one run of `once`; profiling is on in sessions of its own."""
        plain = {row["name"] for row in self._profiled("plain", once, 1)} if self._graph == "slots" else set()
        rows = self._profiled(self._graph, once, steps)
        return [{**row, "adapter": bool(plain) and row["name"] not in plain} for row in rows]

    def _profiled(self, graph: str, once: Callable[[], Any], steps: int) -> list[dict[str, Any]]:
        kept = self._sessions, self._graph, self._fed
        with tempfile.TemporaryDirectory() as folder:
            self._sessions, self._graph, self._binding = {}, graph, None
            self._fed = self._fed if graph == kept[1] else {}
            session = self._session(graph, profile=str(Path(folder) / "operators"))
            past = self._past
            for _ in range(steps + 1):
                self._past = past  # the same step again
                once()
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            self._sessions, self._graph, self._fed = kept
            self._past, self._binding = past, None
        return _by_operator(events)

    def _session(self, graph: str, profile: str | None = None) -> Any:
        if graph not in self._sessions:
            options = ort.SessionOptions()
            options.log_severity_level = 3  # a warning per adapter slot would drown everything else
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
            # idle threads that spin without end fight for the core that the rest of the device needs
            options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
            if profile is not None:
                options.enable_profiling, options.profile_file_prefix = True, profile
            path = self._folder / self._job["models"][graph]
            session = ort.InferenceSession(os.fspath(path), options, providers=_PROVIDERS[self._provider])
            wanted = _PROVIDERS[self._provider][0]
            if wanted not in session.get_providers():
                others = ", ".join(session.get_providers())
                message = f"ONNX Runtime could not start {wanted} and would have used {others}"
                raise NotStartedError(message, _MISSING.get(self._provider, "see what ONNX Runtime printed"))
            self._sessions[graph] = session
        return self._sessions[graph]

    def _value(self, array: Array) -> Any:
        """Return an array in the device's memory; on the CPU it is borrowed, so it is kept alive here."""
        value = ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)
        self._borrowed.append(array)
        return value

    def close(self) -> None:
        """Free everything."""
        self._binding, self._cache, self._resident, self._fed = None, {}, {}, {}
        self._sessions.clear()


def _find_libraries(provider: str) -> None:
    """Load CUDA libraries that were installed as Python packages, where ONNX Runtime was built for them."""
    wanted = _PROVIDERS[provider][0]
    if wanted not in ort.get_available_providers():
        message = f"ONNX Runtime {ort.__version__} was built without {wanted}"
        raise NotStartedError(message, "pip uninstall onnxruntime && pip install onnxruntime-gpu")
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()


def _by_operator(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return operators with the median of their times, without the first run's; longest first."""
    taken: dict[str, list[float]] = defaultdict(list)
    types: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            taken[name].append(event["dur"] / 1e6)
            types[name] = event["args"]["op_name"]
    rows = [
        {"name": name, "op_type": types[name], "seconds": float(np.median(times[1:] or times))}
        for name, times in taken.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])
