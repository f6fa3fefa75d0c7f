"""ONNX Runtime behind a small wall: the only module that imports it.

Three nouns: `OrtGraph` (one opened graph), `Tensor` (an array in the memory of a device), `Binding` (what is bound to a
graph's inputs and outputs between runs). Everything that ONNX Runtime raises leaves here as a `SessionError`.

Traps that this module is built around, each with a test:

- an OrtValue made from numpy borrows the array's memory, so a `Tensor` and a `Binding` keep what they use alive;
- `run_with_iobinding` ignores active LoRA adapters, so adapters are bound as plain inputs;
- an output that ONNX Runtime allocated stays bound after the run and fails the next one if its shape differs, so it is
  bound anew before each run.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from edgeadapt.errors import SessionError
from edgeadapt.runtime.checks import is_whole

Array = NDArray[Any]

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_BUILT = _PROVIDERS | {"tensorrt": "TensorrtExecutionProvider"}
"""A session runs on the first two; the last one is only measured."""
_FAILURES: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(item for item in vars(ort_state).values() if isinstance(item, type) and issubclass(item, Exception)),
)


def version() -> str:
    """Return ONNX Runtime's version."""
    return str(ort.__version__)


def available_providers() -> tuple[str, ...]:
    """Return the providers that this installation of ONNX Runtime was built with: "cpu" and perhaps "cuda", "tensorrt".

    A provider that is built in can still fail to start; only `open_graph` tells.
    """
    built = ort.get_available_providers()
    return tuple(name for name, long_name in _BUILT.items() if long_name in built)


@dataclass(frozen=True)
class TensorInfo:
    """One input or output as the graph declares it; an axis that may vary is a string or None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        axes = ", ".join("?" if axis is None else str(axis) for axis in self.shape)
        return f"{self.dtype.name}[{axes}]"


class Tensor:
    """An array in a device's memory that stays alive as long as this object.

    `shape` and `dtype` are the array's; `row(i)` is a view of one row of the first axis.
    """

    def __init__(self, array: Array, device: str = "cpu") -> None:
        owned = array if array.flags.c_contiguous else np.ascontiguousarray(array)
        self.device = device
        self.shape: tuple[int, ...] = owned.shape
        self.dtype: np.dtype[Any] = owned.dtype
        self._array: Array | None = owned if device == "cpu" else None
        try:
            self._value: Any = ort.OrtValue.ortvalue_from_numpy(owned, device, 0)
        except _FAILURES as error:
            raise _failed(f"an array {owned.dtype.name}{list(owned.shape)} cannot be on {device!r}", error) from error

    def row(self, index: int) -> Rows:
        """Return a view of row `index` with a first axis of 1; it shares memory with this tensor and keeps it alive."""
        return self.rows(index, 1)

    def rows(self, first: int, count: int) -> Rows:
        """Return a view of `count` rows of the first axis; it shares memory with this tensor and keeps it alive."""
        if first < 0 or count < 1 or first + count > self.shape[0]:
            raise IndexError((first, count))
        return Rows(self, first, count)

    def write(self, row: int, values: Array, start: int = 0) -> None:
        """Write `values` [heads, length, dim] over row `row` [heads, longer, dim], from position `start` on."""
        place = (row, slice(None), slice(start, start + values.shape[1]))
        if self._array is not None:
            self._array[place] = values
            return
        array = self.numpy()
        array[place] = values
        self._value.update_inplace(array)

    def numpy(self) -> Array:
        """Return the values: on the CPU the memory itself, else a copy."""
        return np.asarray(self._value.numpy()) if self._array is None else self._array

    def address(self) -> int:
        """Return where the values begin in the device's memory."""
        return int(self._value.data_ptr())

    def bind_input(self, io: Any, name: str) -> None:
        """Bind as input `name` of an ONNX Runtime IOBinding (used by `Binding`)."""
        io.bind_ortvalue_input(name, self._value)

    def bind_output(self, io: Any, name: str) -> None:
        """Bind as output `name` of an ONNX Runtime IOBinding (used by `Binding`)."""
        io.bind_ortvalue_output(name, self._value)


class Rows:
    """Some rows of a tensor's first axis, in place."""

    def __init__(self, parent: Tensor, first: int, count: int) -> None:
        self.shape = (count, *parent.shape[1:])
        self.dtype = parent.dtype
        self._parent = parent  # keeps the memory alive
        self._first = first
        self._address = parent.address() + first * math.prod(parent.shape[1:]) * self.dtype.itemsize

    def row(self, index: int) -> Rows:
        """Return a view of row `index` of these."""
        return self.rows(index, 1)

    def rows(self, first: int, count: int) -> Rows:
        """Return a view of `count` of these rows."""
        if first < 0 or count < 1 or first + count > self.shape[0]:
            raise IndexError((first, count))
        return self._parent.rows(self._first + first, count)

    def write(self, row: int, values: Array, start: int = 0) -> None:
        """Write `values` over row `row` of these, from position `start` on; see `Tensor.write`."""
        self._parent.write(self._first + row, values, start)

    def numpy(self) -> Array:
        """Return the values: on the CPU the memory itself, else a copy."""
        return self._parent.numpy()[self._first : self._first + self.shape[0]]

    def bind_input(self, io: Any, name: str) -> None:
        """Bind as input `name` of an ONNX Runtime IOBinding (used by `Binding`)."""
        io.bind_input(name, self._parent.device, 0, self.dtype.type, list(self.shape), self._address)

    def bind_output(self, io: Any, name: str) -> None:
        """Bind as output `name` of an ONNX Runtime IOBinding (used by `Binding`)."""
        io.bind_output(name, self._parent.device, 0, self.dtype.type, list(self.shape), self._address)


_GONE = Tensor(np.zeros(0, np.float32))
"""Stands for an output's tensor that a resting binding let go of."""


class Binding:
    """What is bound to one graph; binding the same tensor again costs nothing, only what changed is passed on.

    base: an adapter's tensors by name, bound once and for all; names of other inputs and outputs must be others
    """

    def __init__(self, graph: OrtGraph, base: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self._base = base  # keeps it alive
        self._io = graph.new_io_binding()
        self._inputs: dict[str, Tensor | Rows] = {}
        self._outputs: dict[str, Tensor | Rows | None] = {}
        self._allocates = False
        self._shared: Mapping[str, Tensor | Rows] | None = None
        self._gone: set[str] = set()
        for name, tensor in base.items():
            self._bind_input(name, tensor)

    def rest(self) -> None:
        """Let go of all but the base until the next use, so that a binding that waits holds no cache's memory.

        ONNX Runtime still knows where it was, so nothing runs before all of it is bound anew. For the CPU only: on
        another device the memory is ONNX Runtime's, which would go on holding it.
        """
        self._gone = {*self._inputs, *self._outputs}
        self._inputs = {}
        self._outputs = dict.fromkeys(self._outputs, _GONE)  # in the order in which ONNX Runtime gives them
        self._shared, self._allocates = None, False

    def set_input(self, name: str, tensor: Tensor | Rows) -> None:
        """Bind `tensor` to input `name` until it is replaced."""
        if self._inputs.get(name) is tensor:
            return
        self._bind_input(name, tensor)
        self._inputs[name] = tensor
        self._gone.discard(name)

    def _bind_input(self, name: str, tensor: Tensor | Rows) -> None:
        try:
            tensor.bind_input(self._io, name)
        except _FAILURES as error:
            what = f"input {name!r} of {self.graph.name} refused {tensor.dtype.name}{list(tensor.shape)}"
            raise _failed(what, error) from error

    def set_output(self, name: str, tensor: Tensor | Rows) -> None:
        """Have output `name` written into `tensor` until it is replaced."""
        if self._outputs.get(name) is tensor:
            return
        try:
            tensor.bind_output(self._io, name)
        except _FAILURES as error:
            what = f"output {name!r} of {self.graph.name} refused {tensor.dtype.name}{list(tensor.shape)}"
            raise _failed(what, error) from error
        self._outputs[name] = tensor
        self._gone.discard(name)
        self._allocates = None in self._outputs.values()

    def share(self, group: Mapping[str, Tensor | Rows], past: str, present: str) -> None:
        """Bind each tensor of `group` as input `past` + name and as output `present` + name at once.

        The same mapping again costs nothing, however many tensors it holds.
        """
        if self._shared is group:
            return
        for name, tensor in group.items():
            self.set_input(past + name, tensor)
            self.set_output(present + name, tensor)
        self._shared = group

    def allocate_output(self, name: str) -> None:
        """Have ONNX Runtime allocate output `name` in each run; `run` returns it."""
        if name in self._outputs and self._outputs[name] is None:
            return
        self._io.bind_output(name, "cpu", 0)  # takes its place in the order of outputs
        self._outputs[name] = None
        self._gone.discard(name)
        self._allocates = True

    def run(self) -> dict[str, Array]:
        """Run the graph once and return the allocated outputs, each in memory of its own."""
        if self._gone:
            raise AssertionError(f"{self.graph.name} would run with what is gone: {', '.join(sorted(self._gone))}")
        try:
            if not self._allocates:
                self.graph.run_bound(self._io)
                return {}
            # ONNX Runtime keeps outputs in the order in which their names were first bound, as this dict does
            allocated = [(place, name) for place, (name, tensor) in enumerate(self._outputs.items()) if tensor is None]
            for _, name in allocated:
                self._io.bind_output(name, "cpu", 0)
            self.graph.run_bound(self._io)
            values = self._io.get_outputs_as_ortvaluevector()
            return {name: np.asarray(values[place].numpy()) for place, name in allocated}
        except _FAILURES as error:
            raise _failed(f"{self.graph.name} failed to run", error) from error


class OrtGraph:
    """One ONNX graph opened in ONNX Runtime.

    inputs: required inputs; optional: inputs with a default (adapter slots, `logits_from`); outputs: all outputs
    """

    def __init__(self, path: Path, *, threads: int | None, provider: str) -> None:
        self.name = path.name
        self.device = "cuda" if provider == "cuda" else "cpu"
        options = ort.SessionOptions()
        options.log_severity_level = 3  # a warning per adapter slot would drown everything else
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # Idle threads spin for so long before they sleep. Without an end (the default) a core that another process or
        # another session uses is fought for: measured, 22.8 ms a token instead of 10.3; alone it makes no difference.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
        wanted = [_PROVIDERS[provider]] if provider == "cpu" else [_PROVIDERS[provider], _PROVIDERS["cpu"]]
        try:
            self._session: Any = ort.InferenceSession(str(path), options, providers=wanted)
        except _FAILURES as error:
            hint = "check the bundle with `edgeadapt verify`"
            raise _failed(f"{path} could not be opened", error, hint) from error
        if _PROVIDERS[provider] not in self._session.get_providers():
            raise _cuda_not_started()
        self.inputs = _infos(self._session.get_inputs())
        self.optional = _infos(self._session.get_overridable_initializers())
        self.outputs = _infos(self._session.get_outputs())

    def new_io_binding(self) -> Any:
        """Return a fresh ONNX Runtime IOBinding (used by `Binding`)."""
        return self._session.io_binding()

    def run_bound(self, io: Any) -> None:
        """Run with an IOBinding (used by `Binding`)."""
        self._session.run_with_iobinding(io)


def open_graph(path: Path, *, threads: int | None = None, provider: str = "cpu") -> OrtGraph:
    """Return the graph at `path`, opened for `provider` ("cpu" or "cuda").

    Args:
        path: the ONNX file; its external data lies beside it.
        threads: threads inside an operator, None for ONNX Runtime's own choice (one per physical core).
        provider: "cuda" never falls back to the CPU without an error.

    Raises:
        SessionError: if an argument is wrong, the file cannot be opened, or the provider cannot be used here.
    """
    check_provider(provider)
    if threads is not None and not is_whole(threads, 1):
        raise SessionError(f"threads is {threads!r}", hint="give a whole number of 1 or more, or None for the default")
    if not path.is_file():
        raise SessionError(f"the graph {path} does not exist", hint="check the bundle with `edgeadapt verify`")
    if provider == "cuda":
        _preload_cuda()
    return OrtGraph(path, threads=threads, provider=provider)


def save_prepacked(source: Path, target: Path, weights_name: str) -> None:
    """Write the graph at `source` with its weights also in the layout that the kernels of this processor want.

    Sessions over the written file map those weights instead of making copies of their own.

    Args:
        source: an ONNX file.
        target: the file to write.
        weights_name: the name of the file beside it that takes the weights.

    Raises:
        SessionError: if the graph cannot be opened or written.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Optimizations reorder weights, and then the plain and the slots graph's files would not be the same any more. They
    # are done when the written graph is opened: 0.03 s of 0.17.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights_name)
    try:
        ort.InferenceSession(str(source), options, providers=[_PROVIDERS["cpu"]])
    except _FAILURES as error:
        raise _failed(f"{source} could not be written to {target} for shared use", error) from error
    # glibc would keep the memory of the session that is gone now: measured, 144 MB of 280
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def check_provider(provider: str) -> None:
    """Raise a `SessionError` that says why `provider` cannot be used here, if that can be known beforehand.

    Raises:
        SessionError: for an unknown provider, or if CUDA is asked for without a GPU or without ONNX Runtime for CUDA.
    """
    if provider not in _PROVIDERS:
        raise SessionError(f"unknown provider {provider!r}", hint=f"known: {', '.join(_PROVIDERS)}")
    if provider == "cuda":
        check_gpu(provider)


def check_gpu(provider: str) -> None:
    """Raise a `SessionError` that says why `provider` ("cuda" or "tensorrt") cannot be used here, if that is known.

    Raises:
        SessionError: if no GPU is visible, or ONNX Runtime was built without CUDA or TensorRT.
    """
    if not gpu_is_visible():
        raise SessionError(
            f"provider {provider!r} needs an NVIDIA GPU, and none can be seen (no /dev/nvidia*, no nvidia-smi)",
            hint="choose 'cpu', or a machine with a GPU and its driver",
        )
    built = available_providers()
    if "cuda" not in built:
        raise SessionError(
            f"ONNX Runtime {version()} was built without CUDA",
            hint="pip uninstall onnxruntime && pip install onnxruntime-gpu",
        )
    if provider not in built:
        raise SessionError(
            f"ONNX Runtime {version()} was built without TensorRT",
            hint="install a build that has it (https://onnxruntime.ai/docs/execution-providers), or choose 'cuda'",
        )


def gpu_is_visible(devices: Path = Path("/dev")) -> bool:
    """Return whether an NVIDIA GPU can be seen: a device file, or `nvidia-smi` on the path (Windows, WSL)."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists() or shutil.which("nvidia-smi") is not None


def _cuda_not_started() -> SessionError:
    return SessionError(
        "ONNX Runtime could not start CUDA and would have used the CPU: CUDA or cuDNN libraries are missing or too old",
        hint='pip install "onnxruntime-gpu[cuda,cudnn]", or put the CUDA libraries on LD_LIBRARY_PATH',
    )


def _preload_cuda() -> None:
    """Load CUDA libraries that were installed as Python packages; ONNX Runtime prints its complaints on stdout."""
    preload: Callable[[], None] | None = getattr(ort, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(sys.stderr):
            preload()


def _infos(nodes: list[Any]) -> dict[str, TensorInfo]:
    found = {}
    for node in nodes:
        if node.type not in _DTYPES:
            raise SessionError(
                f"{node.name!r} is a {node.type}, which this runtime does not handle", hint="export the model again"
            )
        axes = tuple(axis if isinstance(axis, int | str) else None for axis in node.shape)
        found[node.name] = TensorInfo(node.name, np.dtype(_DTYPES[node.type]), axes)
    return found


def _failed(
    what: str, error: BaseException, hint: str = "check names, shapes and the bundle's files with `edgeadapt verify`"
) -> SessionError:
    """Return what ONNX Runtime raised as an error that begins with `what`."""
    return SessionError(f"{what}: {str(error).strip()}", hint=hint)
