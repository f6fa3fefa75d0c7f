"""OpenVINO, as an app binds it: adapters as plain inputs, a key-value cache that grows."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino.frontend import FrontEndManager

Array = Any

_OPTIONS = ("provider", "threads")
_DEVICES = {"cpu": "CPU"}


def version() -> str:
    """Return OpenVINO's version."""
    return str(ov.__version__)


class _Request:
    """One inference of a graph: `set_tensor` looks for a name among all, nine times as long for 240 inputs."""

    def __init__(self, compiled: Any) -> None:
        self._infer = compiled.create_infer_request()
        self.inputs, self.outputs = (
            {name: place for place, each in enumerate(ports) for name in each.names}  # one may have several names
            for ports in (self._infer.model_inputs, self._infer.model_outputs)
        )
        self.run = self._infer.infer

    def set(self, name: str, value: Any) -> None:
        self._infer.set_input_tensor(self.inputs[name], value)

    def get(self, name: str) -> Any:
        return self._infer.get_output_tensor(self.outputs[name])

    def times(self) -> list[Any]:
        return list(self._infer.profiling_info)


class Engine:
    """The graphs of a job; `provider` is one of `_DEVICES`, `threads` those of one inference.

    A text's cache is what the run before gave: two requests take turns, so that none writes what it reads.
    """

    def __init__(self, folder: str, job: dict[str, Any], tensors: dict[str, Array]) -> None:
        unknown = sorted(set(job["options"]) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r} of the engine openvino")
        self._folder, self._job, self._tensors = Path(folder), job, tensors
        self._device, self._threads = _DEVICES[job["options"]["provider"]], job["options"]["threads"]
        self._core = ov.Core()
        self._defaults = {name: tensors[key] for name, key in job["defaults"].items()}
        self._requests: dict[str, list[_Request]] = {}
        self._resident: dict[str | None, dict[str, Any]] = {}
        self._graph = "plain"
        self._active: str | None = None
        self._cache: dict[str, Any] = {}
        self._past = 0

    def open(self) -> None:
        """Compile the plain graph."""
        self._opened("plain")

    def use(self, adapter: str | None) -> None:
        """Have an adapter's tensors fed; the base runs in the plain graph."""
        self._graph, self._active = "plain" if adapter is None else "slots", adapter
        requests = self._opened(self._graph)
        if adapter is not None:
            self._feed(requests, adapter)

    def idle(self) -> None:
        """Run the base in the graph that takes adapters, with adapters of rank 0."""
        self._graph, self._active = "slots" if "slots" in self._job["models"] else "plain", None
        requests = self._opened(self._graph)
        if self._graph == "slots":
            self._feed(requests, None)

    def _feed(self, requests: list[_Request], adapter: str | None) -> None:
        if adapter not in self._resident:
            names = {} if adapter is None else self._job["adapters"][adapter]
            arrays = self._defaults | {name: self._tensors[key] for name, key in names.items()}
            self._resident[adapter] = {name: ov.Tensor(array) for name, array in arrays.items()}
        for request in requests:
            for name, value in self._resident[adapter].items():
                request.set(name, value)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run a single pass."""
        request = self._opened(self._graph)[0]
        for name, value in inputs.items():
            request.set(name, ov.Tensor(np.asarray(value, order="C")))
        request.run()
        return {name: request.get(name).data.copy() for name in self._job["answers"] if name in request.outputs}

    def start(self, ids: Array, capacity: int) -> Array:  # noqa: ARG002 - a cache that grows has no capacity
        """Begin a text; see `engines`."""
        decoder = self._job["decoder"]
        empty = np.zeros([len(ids), decoder["heads"], 0, decoder["head_dim"]], decoder["dtype"])
        self._cache = {pair["past"]: ov.Tensor(empty) for pair in decoder["cache"]}
        self._past = 0
        return self._read(ids)

    def step(self, ids: Array) -> Array:
        """Go on by one token; see `engines`."""
        return self._read(ids)

    def _read(self, ids: Array) -> Array:
        rows, width = ids.shape
        total = self._past + width
        requests = self._opened(self._graph)
        request = requests[0]
        requests.reverse()
        fed = {"input_ids": np.ascontiguousarray(ids, np.int64), "attention_mask": np.ones((rows, total), np.int64)}
        if self._job["decoder"]["logits_from"]:
            fed["logits_from"] = np.asarray([width - 1], np.int64)
        for name, array in fed.items():
            request.set(name, ov.Tensor(array))
        for name, value in self._cache.items():
            request.set(name, value)
        request.run()
        self._cache = {pair["past"]: request.get(pair["present"]) for pair in self._job["decoder"]["cache"]}
        self._past = total
        return request.get("logits").data[:, -1].copy()

    def operators(self, once: Callable[[], Any], steps: int) -> list[dict[str, Any]]:
        """Return the time of each operator in one run of `once`; profiling is on in graphs of their own."""
        plain = {row["name"] for row in self._profiled("plain", once, 1)} if self._graph == "slots" else set()
        rows = self._profiled(self._graph, once, steps)
        return [{**row, "adapter": bool(plain) and row["name"] not in plain} for row in rows]

    def _profiled(self, graph: str, once: Callable[[], Any], steps: int) -> list[dict[str, Any]]:
        kept = self._requests, self._graph, self._cache, self._past
        self._requests, self._graph = {}, graph
        requests = self._opened(graph, profile=True)
        if graph == "slots":
            self._feed(requests, self._active)
        taken: dict[tuple[str, str], list[float]] = defaultdict(list)
        for turn in range(steps + 1):
            self._cache, self._past = kept[2], kept[3]  # the same step again
            once()
            if turn:  # the first one prepares kernels
                for found in requests[-1 if self._job["decoder"] else 0].times():
                    taken[found.node_name, found.node_type].append(found.real_time.total_seconds())
        self._requests, self._graph, self._cache, self._past = kept
        return _by_operator(taken)

    def _opened(self, graph: str, *, profile: bool = False) -> list[_Request]:
        """Return two requests to a graph, which is compiled when it is first needed."""
        if graph not in self._requests:
            settings = {
                "INFERENCE_NUM_THREADS": self._threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it: other answers
                "PERF_COUNT": profile,
            }
            model = self._read_model(self._folder / self._job["models"][graph])
            compiled = self._core.compile_model(model, self._device, settings)
            self._requests[graph] = [_Request(compiled) for _ in range(2)]
            for request in self._requests[graph]:
                for name in self._defaults.keys() & request.inputs.keys():
                    request.set(name, ov.Tensor(self._defaults[name]))
        return self._requests[graph]

    def _read_model(self, path: Path) -> Any:
        """Return the model at `path`, with the sizes of adapters' inputs that are the same for all of them.

        A bundle's graph says none; from none follow none of what depends on them, and attention needs its own.
        """
        frontend = FrontEndManager().load_by_framework("onnx")
        found = frontend.load(os.fspath(path))
        for name, array in self._defaults.items():
            place = found.get_place_by_tensor_name(name)
            if place is not None and place.is_input():
                found.set_partial_shape(place, ov.PartialShape([size or -1 for size in array.shape]))
        return frontend.convert(found)

    def close(self) -> None:
        """Free everything."""
        self._cache, self._resident = {}, {}
        self._requests.clear()


def _by_operator(taken: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """Return operators that ran with the median of their times, longest first."""
    medians = {names: float(np.median(times)) for names, times in taken.items()}
    ran = sorted((names for names, seconds in medians.items() if seconds > 0), key=lambda names: -medians[names])
    return [{"name": name, "op_type": kind, "seconds": medians[name, kind]} for name, kind in ran]
