"""torch, operator by operator: the job's ONNX graphs as torch modules, on the GPU or the CPU.

Weights, adapters and a text's keys and values stay in the device's memory: a run sends ids and a mask there and fetches
logits. Each call waits until the device has done its work, so that whoever takes the time outside measures that, not
how long it takes to ask for it; on a GPU its own clock is read too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._fixed import FixedShapes
from ._not_started import NotStartedError

# beside `engines`, which on a device is no part of edgeadapt
_graph, _network, _request = (
    import_module(f"{__package__.removesuffix('engines')}convert.{name}") for name in ("graph", "network", "request")
)
Array = Any


def version() -> str:
    """Return torch's version, which says what it was built for."""
    return str(torch.__version__)


class Engine(FixedShapes):
    """The graphs of a job.

    Options: provider ("cuda" or "cpu"); threads, on the CPU; signatures: by form and name, as `convert.request` has it
    """

    NAME = "torch_eager"

    def __init__(self, folder: str, job: dict[str, Any], tensors: dict[str, Array]) -> None:
        known = {name: value for name, value in job["options"].items() if name != "provider"}
        super().__init__(folder, {**job, "options": known}, tensors)
        self._device = _device(job["options"]["provider"])
        self._clock = _Clock() if self._device.type == "cuda" else None
        self._requests, self._signatures = self._signatures, {}
        self._neutral: dict[str, Array] = {}
        self._resident: dict[str | None, dict[str, Array]] = {}
        self._planned = _network.Weights()
        self._weights: dict[tuple[Any, ...], torch.nn.Parameter] = {}
        torch.set_num_threads(self._threads)
        torch.backends.cudnn.allow_tf32 = False  # matrix products have it off unless asked for, convolutions on

    def use(self, adapter: str | None) -> None:
        """Have an adapter's tensors fed; the base runs in the plain graph."""
        if adapter is None:
            self._form, self._fed = "plain", {}
            self._model("plain")
        else:
            self._feed(adapter)

    def idle(self) -> None:
        """Run the base in the graph that takes adapters, with what stands for none."""
        if "slots" in self._job["models"]:
            self._feed(None)
        else:
            self.use(None)

    def _feed(self, adapter: str | None) -> None:
        self._model("slots")
        if adapter not in self._resident:
            self._resident[adapter] = {name: self._there(array) for name, array in self._arrays(adapter).items()}
        self._form, self._fed = "slots", self._resident[adapter]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run a single pass; see `engines`."""
        with self._timed():
            return {name: _told(value) for name, value in super().run(inputs).items()}

    def start(self, ids: Array, capacity: int) -> Array:
        """Begin a text; see `engines`."""
        with self._timed():
            return _told(super().start(ids, capacity))

    def step(self, ids: Array) -> Array:
        """Go on by one token; see `engines`."""
        with self._timed():
            return _told(super().step(ids))

    def gpu_times(self) -> list[float]:
        """Return the seconds of each call since the last question, on the GPU's clock; none on the CPU."""
        return [] if self._clock is None else self._clock.take()

    def gpu_allocator_bytes(self) -> int | None:
        """Return what torch has reserved of the GPU's memory, without what the driver needs besides."""
        return None if self._clock is None else int(torch.cuda.memory_reserved(self._device))

    def close(self) -> None:
        """Free everything."""
        super().close()
        self._planned, self._weights, self._neutral, self._resident = _network.Weights(), {}, {}, {}
        if self._clock is not None:
            torch.cuda.empty_cache()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        with torch.inference_mode():
            if self._clock is None:
                yield
            else:
                with self._clock.running():
                    yield

    def _model(self, form: str) -> Any:
        """Return the modules of a form by signature, made when it is first needed."""
        if form not in self._models:
            graph = _graph.read_graph(Path(self._folder) / self._job["models"][form])
            requests = self._requests[form]
            networks = {name: _request.network(graph, wanted, self._planned) for name, wanted in requests.items()}
            self._place(networks, self._planned.keys())
            if self._device.type != "cpu":
                self._planned = _network.Weights()  # else the CPU would keep a copy of what the GPU holds
            shapes = {
                name: {key: each["shape"] for key, each in wanted["inputs"].items()}
                for name, wanted in requests.items()
            }
            if form == "slots":
                names = {name for inputs in self._job["adapters"].values() for name in inputs}
                sizes = next(iter(shapes.values()))
                self._neutral = {name: _request.neutral(graph, name, sizes[name]) for name in sorted(names)}
            self._signatures[form] = {name: {"inputs": shapes[name], "outputs": graph.outputs} for name in networks}
            self._models[form] = networks
        return self._models[form]

    def _place(self, networks: dict[str, Any], keys: dict[int, tuple[Any, ...]]) -> None:
        """Put the weights of networks, which are planned on the CPU, into the device's memory; equal ones once."""
        for network in networks.values():
            for name, parameter in list(network.named_parameters()):
                key = keys.get(id(parameter), ("own", id(network), name))
                if key not in self._weights:
                    moved = parameter.data.to(self._device)
                    self._weights[key] = torch.nn.Parameter(moved, requires_grad=False)
                network.register_parameter(name, self._weights[key])

    def _call(self, model: Any, _form: str, signature: str, inputs: dict[str, Array]) -> list[Array]:
        return list(model[signature](*(self._there(value) for value in inputs.values())))

    def _arrays(self, adapter: str | None) -> dict[str, Array]:
        """Return what an adapter's inputs hold, zeros beyond its own rank, and what stands for none."""
        names = {} if adapter is None else self._job["adapters"][adapter]
        return {
            name: _grown(self._tensors[names[name]], neutral.shape) if name in names else neutral
            for name, neutral in self._neutral.items()
        }

    def _begin(self, capacity: int) -> None:
        """Have a cache on the device, whose memory is kept: what it holds of another text is masked."""
        if not self._cache:
            shapes = self._signatures[self._form]["decode"]["inputs"]
            names = [pair["past"] for pair in self._job["decoder"]["cache"]]
            self._cache = {name: torch.zeros(shapes[name], device=self._device) for name in names}
        super()._begin(capacity)

    def _there(self, array: Array) -> Array:
        """Return an array in the device's memory."""
        return array if isinstance(array, torch.Tensor) else torch.tensor(array, device=self._device)


def _told(value: Array) -> Array:
    """Return what was computed as numpy's; of a prompt that was read token by token it is already."""
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value


class _Clock:
    """The GPU's clock: events in its queue before and after what is run, which is waited for."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        yield
        end.record()
        torch.cuda.synchronize()
        self._pairs.append((begin, end))

    def take(self) -> list[float]:
        """Return seconds and forget them."""
        taken = [begin.elapsed_time(end) / 1e3 for begin, end in self._pairs]
        self._pairs = []
        return taken


def _grown(array: Array, shape: tuple[int, ...]) -> Array:
    return np.pad(array, [(0, want - have) for have, want in zip(array.shape, shape, strict=True)])


def _device(provider: str) -> torch.device:
    """Return where to run.

    Raises:
        NotStartedError: if it is to be a GPU, and torch sees none; with what CUDA says.
    """
    if provider == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if found:
        return torch.device("cuda", torch.cuda.current_device())
    message = f"torch {version()} sees no CUDA device"
    if torch.version.cuda is None:
        hint = "install torch's build for CUDA (https://pytorch.org/get-started/locally), or choose --device cpu"
        raise NotStartedError(f"{message}: it was built without CUDA", hint)
    told = "".join(f": {str(each.message).strip()}" for each in said[:1])
    raise NotStartedError(
        f"{message}, and was built for CUDA {torch.version.cuda}{told}",
        "see that nvidia-smi lists a GPU, and that its driver is new enough for this CUDA",
    )
