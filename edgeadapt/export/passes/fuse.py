"""Fuse norms, attention and activations with onnxscript's rules for ONNX Runtime."""

from __future__ import annotations

import logging
import warnings

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions import optimize_for_ort

from edgeadapt.export.graph import MARKER_DOMAIN


def fuse(model: ir.Model) -> ir.Model:
    """Return `model` with fused operators."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, _counts = optimize_for_ort(model, clear_metadata=True)
    finally:
        logger.setLevel(level)
    model.opset_imports.setdefault("com.microsoft", 1)
    model.opset_imports.setdefault(MARKER_DOMAIN, 1)
    return model
