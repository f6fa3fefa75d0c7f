"""`python -m convert.coreml REQUEST.json`: an .mlpackage per signature, opened again, its specification compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import coremltools as ct
import torch
from coremltools.optimize import coreml as optimize

from .graph import ConversionError
from .network import Network
from .request import Model, Precision, main


def write(model: Model, folder: Path, precision: Precision) -> list[str]:
    """Write `model`; int8 is int8 weights per channel, which Core ML widens as it runs."""
    files = []
    for name, network in model.signatures.items():
        file = folder / f"{model.name}.{name}.mlpackage"
        package = converted(network)
        if precision == "int8":
            narrow = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
            package = optimize.linear_quantize_weights(package, optimize.OptimizationConfig(global_config=narrow))
        package.save(str(file))
        check(network, file)
        files.append(file.name)
    return files


def converted(network: Network) -> Any:
    """Return an ML program of the traced network."""
    program = torch.export.export(network, network.examples, strict=False).run_decompositions({})
    return ct.convert(
        program,
        outputs=[ct.TensorType(name=f"output_{place}") for place in range(len(network.output_names))],
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )


def check(network: Network, file: Path) -> None:
    """Compare the saved package's specification with what was asked for.

    Raises:
        ConversionError: naming an input or output that is missing or has another shape.
    """
    spec = ct.models.MLModel(str(file), skip_model_load=True).get_spec()
    shapes = [list(item.type.multiArrayType.shape) for item in spec.description.input]
    wanted = [list(value.shape) or [1] for value in network.examples]
    if shapes != wanted:
        different = next((i for i, (a, b) in enumerate(zip(shapes, wanted, strict=False)) if a != b), len(shapes))
        raise ConversionError(
            f"{file.name}: input {different} ({network.input_names[min(different, len(wanted) - 1)]}) is not what was "
            f"asked for: {len(shapes)} inputs, {len(wanted)} wanted",
            hint="this version of coremltools changes inputs; try the one that decision 0022 names",
        )
    outputs = [item.name for item in spec.description.output]
    if outputs != [f"output_{place}" for place in range(len(network.output_names))]:
        raise ConversionError(
            f"{file.name}: its outputs are {', '.join(outputs)}", hint="this is a bug; please report it"
        )


if __name__ == "__main__":
    sys.exit(main(write))
