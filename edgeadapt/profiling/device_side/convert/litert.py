"""`python -m convert.litert REQUEST.json`: models for LiteRT, one .tflite each, with a signature per kind of run."""

from __future__ import annotations

import sys
from pathlib import Path

import litert_torch
from ai_edge_quantizer import quantizer, recipe

from .request import Model, Precision, main


def write(model: Model, folder: Path, precision: Precision) -> list[str]:
    """Write `model` as a .tflite file; int8 is int8 weights per channel with float activations rounded as it runs."""
    file = folder / f"{model.name}.tflite"
    converter = None
    for name, network in model.signatures.items():
        add = litert_torch.signature if converter is None else converter.signature
        converter = add(name, network, network.examples)
    assert converter is not None  # a model has a signature
    converter.convert().export(str(file))
    if precision == "int8":
        narrow = quantizer.Quantizer(str(file), recipe.dynamic_wi8_afp32())
        narrow.quantize().export_model(str(file), overwrite=True)
    return [file.name]


if __name__ == "__main__":
    sys.exit(main(write))
