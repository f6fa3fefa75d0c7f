"""What an adapter, merged into the float base and rounded on the base's own grid, changes in the packed graphs.

While a graph is quantized, each `Variant` takes its adapter's weight beside the base's, one at a time, and keeps what
differs. `variant_graph` is then the merged model on the base's grid, and `changes` what packing it changes in the files
of the packed base. Merging into codes that are rounded already would lose the adapter: its change of a weight is far
smaller than half a step (docs/decisions/0006-promotion.md).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeadapt.export.graph import ADAPTER_SITE, MARKER_DOMAIN, PARAMETER_SITE, Graph
from edgeadapt.quantize.scheme import Stored
from edgeadapt.quantize.weights import Weight
from edgeadapt.slots import GraphRecord

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

WEIGHTS_PATH = "graph/weights.bin"
_CLOSE_BYTES = 64
"""Apart; a region of a patch costs about as much."""


@dataclass(frozen=True)
class NewValue:
    """One parameter of the base that an adapter changes, float32 in torch's layout, computed when asked for.

    before: the base's value, or None where the adapter replaces it and the base's does not matter
    transposed: torch's layout is [in, out] (GPT-2's Conv1D)
    """

    before: Callable[[], Array] | None
    after: Callable[[], Array]
    transposed: bool = False


@dataclass(frozen=True)
class FileChange:
    """New bytes, uint8[length], at `offset` of a file; `bits` of a code are 4 or 8, 0 for numbers that are no codes."""

    offset: int
    bits: int
    before: Bytes
    after: Bytes


class Variant:
    """One adapter's values for the initializers of a graph, collected while the base is quantized.

    problem: why there can be no patch, or None
    """

    def __init__(self, name: str, parameters: Mapping[str, NewValue]) -> None:
        self.name = name
        self.problem: str | None = None
        self._parameters = parameters
        self._taken: set[str] = set()
        self._new: dict[tuple[str, str], Callable[[Array], Array]] = {}

    def take(self, role: str, graph: ir.Graph, uses: Sequence[Weight], stored: Stored) -> None:
        """Take the adapter's weight for one constant that was just stored.

        Args:
            role: of the graph.
            graph: the quantized graph.
            uses: what read the constant; they hold the base's weight still.
            stored: what the scheme made of it.
        """
        wanted = {use.path: f"{use.path}.weight" for use in uses if f"{use.path}.weight" in self._parameters}
        if not wanted or self.problem is not None:
            return
        others = sorted({use.path for use in uses} - set(wanted)) + sorted(wanted)[1:]
        path, name = next(iter(sorted(wanted.items())))
        if others:
            self.problem = f"the weight of {path} is that of {others[0]} too, and only one of them changes"
            return
        value = self._parameters[name]
        if value.before is not None and not np.array_equal(_laid(value, value.before()), _current(uses[0])):
            self.problem = f"the weight of {path} is another one in the graph than in the model"
            return
        after = _laid(value, value.after())
        if after.shape != _current(uses[0]).shape:
            self.problem = f"{name} has the shape {list(after.shape)}, the base's has {list(_current(uses[0]).shape)}"
            return
        self._taken.add(name)
        assert stored.again is not None
        for initializer, new in stored.again(after).items():
            current = graph.initializers[initializer].const_value
            assert current is not None
            self._new[role, initializer] = _Delta(current.numpy(), new)

    def finish(self, models: Mapping[str, ir.Model]) -> None:
        """Find the parameters that are no weights (biases, norms, replaced ones) in the quantized graphs."""
        for name in sorted(set(self._parameters) - self._taken):
            if self.problem is None:
                self.problem = self._find(name, models)

    def graph(self, base: Graph) -> Graph:
        """Return the quantized `base` with the adapter's values; they are computed when they are read."""
        models = {role: model.clone() for role, model in base.models.items()}
        for (role, name), new in self._new.items():
            value = models[role].graph.initializers[name]
            assert value.const_value is not None
            value.const_value = _lazy(value.const_value, new)
        return replace(base, models=models)

    def _find(self, name: str, models: Mapping[str, ir.Model]) -> str | None:
        """Take the new value of an initializer that stays in float; return the problem, or None."""
        value, after = self._parameters[name], self._parameters[name].after()
        found = False
        for role, model in models.items():
            initializer = _initializer(model, name)
            if initializer is None:
                if _has_site(model, name.rpartition(".")[0]):
                    return f"{name} is not in the {role} graph as a value of its own"
                continue
            assert initializer.const_value is not None
            current = initializer.const_value.numpy()
            if current.dtype != np.float32 or current.shape != after.shape:
                return f"{name} has the shape {list(after.shape)}, the base's has {list(current.shape)}"
            if value.before is not None and not np.array_equal(value.before(), current):
                return f"{name} is another one in the graph than in the model"
            found = True
            self._new[role, str(initializer.name)] = lambda _old: value.after()
        return None if found else f"{name} is in no graph as a value of its own"


def changes(base: Path, variant: Path, graphs: Mapping[str, GraphRecord]) -> dict[str, list[FileChange]] | str:
    """Return what differs between two packed folders, or why it cannot be said of the base's files.

    Args:
        base: the bundle's folder.
        variant: the same graphs with an adapter's values, packed likewise.
        graphs: the bundle's graphs; only the plain ones are compared.

    Returns:
        The changes of each file that changes, by rising offset.
    """
    found: dict[tuple[int, int], tuple[str, FileChange]] = {}
    files: dict[str, list[FileChange]] = {}
    for record in graphs.values():
        model, other = ir.load(base / record.plain), ir.load(variant / record.plain)
        if list(model.graph.initializers) != list(other.graph.initializers):
            return f"{record.plain} has other values with the adapter than without"
        inline: dict[str, ir.TensorProtocol] = {}
        for name, value in model.graph.initializers.items():
            before, after = value.const_value, other.graph.initializers[name].const_value
            assert before is not None
            assert after is not None
            if not isinstance(before, ir.ExternalTensor):
                if before.tobytes() != after.tobytes():
                    inline[name] = after
                continue
            change = FileChange(int(before.offset or 0), _bits(value), _bytes(before), _bytes(after))
            known = found.setdefault((change.offset, len(change.before)), (name, change))
            if not np.array_equal(known[1].after, change.after):
                return f"{known[0]} and {name} are stored once, and the adapter changes them differently"
        if inline:
            files[record.plain] = _differing_runs((base / record.plain).read_bytes(), _with_values(model, inline))
    ordered = [change for _, (_, change) in sorted(found.items())]
    weights = [change for change in ordered if not np.array_equal(change.before, change.after)]
    return {WEIGHTS_PATH: weights, **files} if weights else files


class _Delta:
    """The difference between two arrays of codes, compressed: few differ."""

    def __init__(self, old: Array, new: Array) -> None:
        self._data = zlib.compress((_raw(new) ^ _raw(old)).tobytes(), 1)

    def __call__(self, old: Array) -> Array:
        changed = _raw(old) ^ np.frombuffer(zlib.decompress(self._data), np.uint8)
        return changed.view(old.dtype).reshape(old.shape)


def _raw(array: Array) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _lazy(old: ir.TensorProtocol, new: Callable[[Array], Array]) -> ir.TensorProtocol:
    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(new(old.numpy())), name=old.name)

    return ir.LazyTensor(compute, old.dtype, ir.Shape(old.shape.numpy()), name=old.name)


def _current(weight: Weight) -> Array:
    return np.asarray(weight.tensor.numpy()) if weight.kind == "conv" else weight.matrix()


def _laid(value: NewValue, array: Array) -> Array:
    return np.ascontiguousarray(array.T) if value.transposed else array


def _initializer(model: ir.Model, name: str) -> ir.Value | None:
    """Return the initializer that holds a parameter: behind its marker, or under its own name."""
    for node in model.graph:
        marker = (node.domain, node.op_type) == (MARKER_DOMAIN, PARAMETER_SITE)
        if marker and node.attributes["parameter"].as_string() == name:
            source = node.inputs[0]
            return source if source is not None and source.is_initializer() else None
    for candidate in (name, f"module.{name}"):
        if candidate in model.graph.initializers:
            return model.graph.initializers[candidate]
    return None


def _has_site(model: ir.Model, path: str) -> bool:
    return any(
        node.op_type == ADAPTER_SITE and node.domain == MARKER_DOMAIN and node.attributes["site"].as_string() == path
        for node in model.graph
    )


def _bits(value: ir.Value) -> int:
    """Return the bits of the codes in an initializer, 0 if it holds none."""
    if value.dtype not in {ir.DataType.UINT8, ir.DataType.INT8}:
        return 0
    found = {user.attributes["bits"].as_int() for user, _ in value.uses() if "bits" in user.attributes}
    return 4 if found == {4} else 8


def _bytes(tensor: ir.TensorProtocol) -> Bytes:
    return np.frombuffer(tensor.tobytes(), np.uint8)


def _with_values(model: ir.Model, values: Mapping[str, ir.TensorProtocol]) -> bytes:
    """Return the bytes of an ONNX file with other values in it, of the same length."""
    for name, tensor in values.items():
        model.graph.initializers[name].const_value = ir.tensor(tensor.numpy(), name=name)
    return bytes(ir.to_proto(model).SerializeToString())


def _differing_runs(before: bytes, after: bytes) -> list[FileChange]:
    """Return the bytes that differ between two files of one length; runs that lie close together are one."""
    one, other = np.frombuffer(before, np.uint8), np.frombuffer(after, np.uint8)
    places = np.flatnonzero(one != other)
    runs = np.split(places, np.flatnonzero(np.diff(places) > _CLOSE_BYTES) + 1)
    parts = [slice(int(run[0]), int(run[-1]) + 1) for run in runs]
    return [FileChange(part.start, 0, one[part], other[part]) for part in parts]
