"""Layers that are all the same code, of which it is enough to trace a few.

A decoder's layers differ in their weights only, and torch's exporter needs half a second for each. So the forward is
run once on the trace's example inputs, and every operator that it dispatches is written down with all its arguments
but the weights' values. Where layers 1, 2, ... of a stack wrote the same, a model of the first `TRACED` layers is
traced, and `stamp.py` writes the others after the last of them. The first layer may differ from the others (T5 computes
its position bias there). Whatever is not proven here, by the operators themselves, is traced whole.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from edgeadapt.export.trace import Trace
from edgeadapt.merging.graft import share

TRACED = 3
"""The first layer, one to copy, and one more to prove that the copy is right."""
FEWEST = TRACED + 2
_LARGEST_CONSTANT = 4096
_LAYER = re.compile(r"^(?:past_key_values|present|cross)\.(\d+)\.")


@dataclass(frozen=True)
class Repeat:
    """A stack of `count` layers at `path` ("model.layers"), of which all but the first do the same."""

    path: str
    count: int


def layer_of(name: str) -> int | None:
    """Return the layer that a graph input or output belongs to ("past_key_values.3.key"), None where to none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def shorten(trace: Trace) -> Trace:
    """Return `trace` without the inputs and outputs of layers that are not traced."""

    def traced(name: str) -> bool:
        layer = layer_of(name)
        return layer is None or layer < TRACED

    return replace(
        trace,
        inputs={name: tensor for name, tensor in trace.inputs.items() if traced(name)},
        outputs=tuple(name for name in trace.outputs if traced(name)),
    )


@contextlib.contextmanager
def shortened(module: torch.nn.Module, repeat: Repeat) -> Iterator[Mapping[int, str]]:
    """Leave only the first layers in the stack inside the block, all but the very first with random weights.

    So nothing that torch or a fusion computes from a layer's weights can pass for a constant that all layers share.

    Yields:
        the names in `module` of the weights that random ones stand for, by the address of the random ones.
    """
    path, _, name = repeat.path.rpartition(".")
    owner = module.get_submodule(path)
    whole = owner._modules[name]  # noqa: SLF001 - a model may refuse the assignment of another list
    assert isinstance(whole, torch.nn.ModuleList)
    generator = torch.Generator().manual_seed(0)
    layers = [whole[0], *(_randomized(layer, generator) for layer in list(whole)[1:TRACED])]
    owner._modules[name] = torch.nn.ModuleList(layers)  # noqa: SLF001
    try:
        yield {
            tensor.data_ptr(): f"{repeat.path}.{index}.{tensor_name}"
            for index, layer in list(enumerate(layers))[1:]
            for tensor_name, tensor in (*layer.named_parameters(), *layer.named_buffers())
            if tensor.numel()
        }
    finally:
        owner._modules[name] = whole  # noqa: SLF001


def _randomized(layer: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    """Return a copy of `layer` with tensors of its own."""
    copy = share(layer)
    for tensor in (*copy.parameters(), *copy.buffers()):
        own = torch.empty_like(tensor)
        tensor.data = own.uniform_(generator=generator) if own.is_floating_point() else own.copy_(tensor)
    return copy


def find_repeat(module: torch.nn.Module, trace: Trace) -> Repeat | None:
    """Return the stack whose layers are proven to be the same code, or None.

    Args:
        module: the base's module, inside of `trace.module`.
        trace: what will be traced, with the markers in place.
    """
    stacks = {path: stack for path, stack in _stacks(module).items() if _contiguous(stack)}
    if not stacks:
        return None
    record = _record(trace, stacks)
    called = {path for path, _ in record.layers}
    if len(called) != 1:
        return None
    path = called.pop()
    repeat = Repeat(path, len(stacks[path]))
    if list(record.layers) != [(path, index) for index in range(repeat.count)] or not _same(record, path):
        return None
    with shortened(module, repeat):
        stack = module.get_submodule(path)
        assert isinstance(stack, torch.nn.ModuleList)
        short = _record(shorten(trace), {path: stack})
    same_around = short.complete and (record.before, record.after, record.results) == (
        short.before,
        short.after,
        short.results,
    )
    return repeat if same_around and _same(short, path, record.layers[path, 1]) else None


def _contiguous(stack: torch.nn.ModuleList) -> bool:
    return all(tensor.is_contiguous() for tensor in (*stack.parameters(), *stack.buffers()))


def _stacks(module: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """Return the outermost lists of at least `FEWEST` modules, by path."""
    found: dict[str, torch.nn.ModuleList] = {}
    for path, child in module.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if isinstance(child, torch.nn.ModuleList) and len(child) >= FEWEST and not inside:
            found[path] = child
    return found


def _same(record: _Record, path: str, pattern: list[Hashable] | None = None) -> bool:
    """Return whether all layers but the first did what `pattern`, or the second layer, did."""
    layers = [log for (owner, index), log in record.layers.items() if owner == path and index > 0]
    return record.complete and len(layers) > 1 and all(log == (pattern or layers[0]) for log in layers)


@dataclass
class _Record:
    """What one forward dispatched, tensors written as where they come from.

    layers: per (stack, index), in the order of the calls; layers' numbers as distances, so that equal code is equal
    before, after: outside of the layers
    results: where the outputs come from, those of layers by (name without number, origin within the layer)
    complete: False if something happened between two layers, what follows reads another layer than the last, or a
        tensor's origin is not known
    """

    layers: dict[tuple[str, int], list[Hashable]]
    before: list[Hashable]
    after: list[Hashable]
    results: set[Hashable]
    complete: bool = True


def _record(trace: Trace, stacks: Mapping[str, torch.nn.ModuleList]) -> _Record:
    recorder = _Recorder(trace)
    handles = []
    for path, stack in stacks.items():
        for index, layer in enumerate(stack):
            handles += [
                layer.register_forward_pre_hook(lambda *_, at=(path, index): recorder.enter(at)),
                layer.register_forward_hook(lambda _layer, _args, output: recorder.leave(output)),
            ]
    try:
        with torch.no_grad(), recorder:
            results = trace.module(*trace.inputs.values())
    finally:
        for handle in handles:
            handle.remove()
    names = trace.outputs or tuple(f"output_{index}" for index in range(len(results)))
    return recorder.finish(dict(zip(names, results, strict=True)))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    """Writes down every dispatched operator."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = _Record({}, [], [], set())
        self.at: tuple[str, int] | None = None
        self.origins: MutableMapping[torch.Tensor, Any] = WeakTensorKeyDictionary()
        for name, tensor in trace.inputs.items():
            self.origins[tensor] = ("input", name)
        for name, tensor in (*trace.module.named_parameters(), *trace.module.named_buffers()):
            self.origins[tensor] = ("weight", name, str(tensor.dtype), tuple(tensor.shape), tensor.stride())

    def enter(self, at: tuple[str, int]) -> None:
        if self.at is not None or at in self.record.layers or self.record.after:
            self.record.complete = False
        self.at = at
        self.record.layers[at] = []

    def leave(self, output: Any) -> None:
        assert self.at is not None
        for place, leaf in enumerate(tree_leaves(output)):
            if isinstance(leaf, torch.Tensor):
                self.record.layers[self.at].append(("returns", place, self._written(leaf)))
                self.origins[leaf] = ("result", self.at[1], place)
        self.at = None

    def finish(self, results: Mapping[str, torch.Tensor]) -> _Record:
        for name, tensor in results.items():
            layer = layer_of(name)
            origin = self.origins.get(tensor)
            if layer is None:
                self.record.results.add((name, self._written(tensor)))
            elif origin is None or origin[0] not in ("operator", "result") or origin[1] != layer:
                self.record.complete = False
            elif layer > 0:
                self.record.results.add((name.replace(f".{layer}.", ".#.", 1), origin[2:]))
        return self.record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = (str(func), tree_map(self._written, list(args)), tree_map(self._written, dict(kwargs or {})))
        result = func(*args, **(kwargs or {}))
        log = self._log()
        log.append(repr(written))
        for place, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, torch.Tensor):
                number = None if self.at is None else self.at[1]
                self.origins[leaf] = ("operator", number, len(log), place, bool(self.record.layers))
        return result

    def _log(self) -> list[Hashable]:
        if self.at is not None:
            return self.record.layers[self.at]
        return self.record.after if self.record.layers else self.record.before

    def _written(self, value: Any) -> Hashable:
        """Return an argument as it is compared between layers."""
        if isinstance(value, str) and self.at is not None:
            return value.replace(f"{self.at[0]}.{self.at[1]}.", f"{self.at[0]}.#.")
        if not isinstance(value, torch.Tensor):
            return repr(value)
        origin = self.origins.get(value)
        if origin is None:
            return self._constant(value)
        kind, *rest = origin
        if kind in ("input", "weight") and self.at is not None:
            number = self.at[1]
            rest[0] = rest[0].replace(f".{number}.", ".#.", 1) if layer_of(rest[0]) == number else rest[0]
            rest[0] = rest[0].replace(f"{self.at[0]}.{number}.", f"{self.at[0]}.#.")
        elif kind in ("operator", "result") and rest[0] is not None:
            rest[0] = self._distance(rest[0])
        return (kind, *rest)

    def _distance(self, layer: int) -> int | str:
        """Return how far back `layer` is. What comes after the layers may read the last one only."""
        if self.at is not None:
            return layer - self.at[1]
        if layer != max(index for _, index in self.record.layers):
            self.record.complete = False
        return "last"

    def _constant(self, value: torch.Tensor) -> Hashable:
        """Return the values of a tensor that no operator made."""
        if value.numel() > _LARGEST_CONSTANT:
            self.record.complete = False
        return ("constant", str(value.dtype), tuple(value.shape), value.numpy(force=True).tobytes())
