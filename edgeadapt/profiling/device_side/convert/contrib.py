"""Operators of com.microsoft but those of attention, as edgeadapt's graphs use them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .dequantize import matrix_of_blocks, table_of_blocks
from .graph import Node
from .operator_table import MICROSOFT, Tensor, operator, refuse_attributes
from .operators import rms_norm


@operator("MatMulNBits", domain=MICROSOFT, prepare=matrix_of_blocks, prepared=(1, 2, 3))
def _mat_mul_n_bits(node: Node, x: Tensor, weight: Tensor, *rest: Tensor | None, prepared: bool = False) -> Tensor:
    """Multiply by the float weight; inputs 4 (order of columns) is not used by edgeadapt, 5 is the bias."""
    refuse_attributes(
        node, {**dict.fromkeys(("K", "N", "bits", "block_size", "accuracy_level"), ...), "weight_prepacked": 0}
    )
    assert prepared  # the weights of MatMulNBits are constants
    assert not rest or rest[0] is None
    return functional.linear(x, weight, rest[1] if len(rest) > 1 else None)


@operator("GatherBlockQuantized", domain=MICROSOFT, prepare=table_of_blocks, prepared=(0, 2, 3))
def _gather_block_quantized(node: Node, table: Tensor, indices: Tensor, *, prepared: bool = False) -> Tensor:
    refuse_attributes(node, {"bits": ..., "block_size": ..., "gather_axis": 0, "quantize_axis": 1})
    assert prepared
    return functional.embedding(indices, table)


@operator("FusedMatMul", domain=MICROSOFT)
def _fused_mat_mul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    refuse_attributes(node, {"alpha": ..., "transA": ..., "transB": ..., "transBatchA": 0, "transBatchB": 0})
    a = a.transpose(-1, -2) if node.get("transA", 0) else a
    b = b.transpose(-1, -2) if node.get("transB", 0) else b
    return torch.matmul(a, b) * float(node.get("alpha", 1.0))


@operator("QuickGelu", domain=MICROSOFT)
def _quick_gelu(node: Node, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x * node.get("alpha", 1.702))


@operator("BiasGelu", domain=MICROSOFT)
def _bias_gelu(_node: Node, x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias)


@operator("FastGelu", domain=MICROSOFT)
def _fast_gelu(_node: Node, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("SkipLayerNormalization", domain=MICROSOFT)
def _skip_layer_norm(node: Node, x: Tensor, skip: Tensor, scale: Tensor, *biases: Tensor | None) -> Any:
    """Return the norm of x + skip (+ bias), and the sum as the fourth output; the second and third are for training."""
    refuse_attributes(node, {"epsilon": ...})
    total = x + skip
    if len(biases) > 1 and biases[1] is not None:
        total = total + biases[1]
    beta = biases[0] if biases else None
    normed = functional.layer_norm(total, total.shape[-1:], scale, beta, node.get("epsilon", 1e-12))
    return normed, None, None, total


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_rms_norm(node: Node, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    refuse_attributes(node, {"epsilon": ...})
    total = x + skip if bias is None else x + skip + bias
    return rms_norm(total, scale, node.get("epsilon", 1e-12)), None, None, total
