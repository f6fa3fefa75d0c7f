"""`python -m convert.executorch REQUEST.json`: programs for ExecuTorch, one .pte each, with a method per signature."""

from __future__ import annotations

import sys
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
from executorch.exir import to_edge_transform_and_lower
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from .network import Network
from .request import Model, Precision, main


def write(model: Model, folder: Path, precision: Precision) -> list[str]:
    """Write `model` as a .pte file; int8 is int8 weights per channel with float activations rounded as it runs."""
    programs = {name: exported(network, precision) for name, network in model.signatures.items()}
    partitioners: list[Any] = [XnnpackPartitioner()]
    if precision == "int8":
        partitioners.insert(0, XnnpackDynamicallyQuantizedPartitioner())
    lowered = to_edge_transform_and_lower(programs, partitioner=partitioners)
    file = folder / f"{model.name}.pte"
    with file.open("wb") as stream:
        lowered.to_executorch().write_to_file(stream)
    return [file.name]


def exported(network: Network, precision: Precision) -> Any:
    """Return the traced network, its linear layers in int8 where that is wanted."""
    program = torch.export.export(network, network.examples, strict=False)
    if precision == "float32":
        return program
    settings = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, settings)
    prepared = prepare_pt2e(program.module(), quantizer)
    prepared(*network.examples)  # what is rounded as it runs needs no samples, but every observer one look
    return torch.export.export(convert_pt2e(prepared), network.examples, strict=False)


if __name__ == "__main__":
    sys.exit(main(write))
