"""`python -m convert.executorch REQUEST.json`: programs for ExecuTorch, the base's weights in one base.ptd beside them.

A program is a .pte with a method per signature. What the base's own program, "plain", holds is written to base.ptd,
and every other program, one for each adapter, finds it there: such a program holds its graph, and what no base has.

What is the base's is told by content: its constants are named by their digests, because ExecuTorch finds a constant of
a .ptd by name, or, inside of XNNPACK's part of the graph, by the digest of its bytes.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
    XnnpackDynamicallyQuantizedPartitioner,
    XnnpackPartitioner,
)
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import ExecutorchBackendConfig, lowered_backend_module, memory, to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch._inductor.pattern_matcher import stable_topological_sort
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from .graph import ConversionError, digest_key
from .network import Network
from .request import PLAIN, Model, Precision, main

_DATA = "base"
_PREFIX = f"{_DATA}_"


class Programs:
    """The programs of one bundle, the base's first."""

    def __init__(self) -> None:
        self._weights: set[str] = set()  # names of the base's constants before their rounding
        self._held: set[str] = set()  # names of those in base.ptd

    def write(self, model: Model, folder: Path, precision: Precision) -> list[str]:
        """Write `model` as a .pte file, and base.ptd with the base's.

        int8 is int8 weights per channel with float activations rounded as it runs, in the base's linear layers; those
        of an adapter stay in float32.

        Raises:
            ConversionError: if the program cannot be opened again with base.ptd.
        """
        first = model.name == PLAIN
        programs = {name: self._exported(network, precision, first) for name, network in model.signatures.items()}
        partitioners: list[Any] = [XnnpackPartitioner()]
        if precision == "int8":
            partitioners.insert(0, XnnpackDynamicallyQuantizedPartitioner())
        with _quick_partitioning():
            lowered = to_edge_transform_and_lower(programs, partitioner=partitioners)
        program = lowered.to_executorch(ExecutorchBackendConfig(external_constants=_place_of))
        file, data = folder / f"{model.name}.pte", folder / f"{_DATA}.ptd"
        with file.open("wb") as stream:
            program.write_to_file(stream)
        if first:
            program.write_tensor_data_to_file(str(folder))
        _check(file, data)
        return [file.name, data.name]

    def _exported(self, network: Network, precision: Precision, first: bool) -> Any:
        """Return the traced network: its constants marked as the base's, its linear layers in int8 if that is wanted.

        Whether a constant is the base's is asked twice, as rounding makes others of them.
        """
        module = torch.export.export(network, network.examples, strict=False).module()
        _mark(module, self._weights, first)
        if precision == "int8":
            module = _rounded(module, network.examples)
        _mark(module, self._held, first)
        return torch.export.export(module, network.examples, strict=False)  # the same module: another loses the marks


@contextmanager
def _quick_partitioning() -> Iterator[None]:
    """Let ExecuTorch sort a graph in place after each partition, of which int8 makes one per linear layer.

    The own way of 1.5.1 copies the whole graph and compiles its Python anew each time: 97 % of the time with SmolLM2. A
    version that has another way keeps it.
    """
    own = getattr(lowered_backend_module, "legalize_graph", None)
    if own is None:
        yield
        return
    lowered_backend_module.legalize_graph = lambda module: stable_topological_sort(module.graph)
    try:
        yield
    finally:
        lowered_backend_module.legalize_graph = own


def _rounded(module: Any, examples: tuple[torch.Tensor, ...]) -> Any:
    """Return the module with the base's linear layers in int8."""
    settings = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, settings)
    quantizer.set_filter_function(_is_of_base)
    prepared = prepare_pt2e(module, quantizer)
    prepared(*examples)  # what is rounded as it runs needs no samples, but every observer one look
    return convert_pt2e(prepared)


def _is_of_base(node: torch.fx.Node) -> bool:
    """Tell whether a linear layer's weight is the base's."""
    weight = node.args[1]
    return isinstance(weight, torch.fx.Node) and str(weight.target).startswith(_PREFIX)


def _mark(module: Any, names: set[str], first: bool) -> None:
    """Name constants by their content, and mark the base's as those that go to base.ptd.

    Args:
        module: a traced one, its constants as attributes.
        names: what is the base's; the first program's are added.
        first: this is the base's own program.
    """
    constants = {node: attrgetter(node.target)(module) for node in module.graph.nodes if node.op == "get_attr"}
    replaced, named = set(), set()
    for node, value in constants.items():
        if not isinstance(value, torch.Tensor) or "lifted_tensor" in node.target:  # a number in the code is no weight
            continue
        digest = hashlib.sha256(repr(digest_key(value.detach().numpy())).encode()).hexdigest()
        if first:
            names.add(digest)
        place = _DATA if digest in names else None
        name = f"{place or 'own'}_{digest[:32]}"
        while name in named:  # two of one content, which rounding makes: scales
            name += "_"
        replaced.add(node.target)
        named.add(name)
        module.register_parameter(name, torch.nn.Parameter(value.detach(), requires_grad=False))
        node.target = node.name = name  # the next tracing finds what is said about an attribute by its node's name
        # for XNNPACK's part of the graph; `_place_of` is asked about the others
        node.meta["custom"] = {**(node.meta.get("custom") or {}), "delegate_constant_tag": place}
    for name in replaced - named:
        delattr(module, name)
    module.recompile()


def _place_of(node: torch.fx.Node) -> str | None:
    """Return the data file of a constant that is an input of the traced program, None for the program itself.

    Its name is the attribute's with a letter for its kind before it: p_base_...
    """
    if not node.name.partition("_")[2].startswith(_PREFIX):
        return None
    # ExecuTorch 1.5.1 fails on another shape of a constant from a data file (_emit_view forgets the file's name)
    return None if any(user.target is memory.view for user in node.users) else _DATA


def _check(file: Path, data: Path) -> None:
    """Open all methods of a program, as a device will.

    Raises:
        ConversionError: if that fails.
    """
    program = Runtime.get().load_program(file, data_path=data)
    try:
        for name in sorted(program.method_names):
            program.load_method(name)
    except RuntimeError as error:
        raise ConversionError(
            f"{file.name} cannot be opened with {data.name}: {error}", hint="this is a bug; please report it"
        ) from error


if __name__ == "__main__":
    sys.exit(main(Programs().write))
