"""Convolutions and pooling of pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .graph import ConversionError, Node
from .operator_table import Tensor, operator, refuse_attributes


@operator("Conv")
def _conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    names = ("kernel_shape", "strides", "pads", "dilations", "group", "auto_pad")
    refuse_attributes(node, dict.fromkeys(names, ...))
    axes = x.ndim - 2
    strides, dilations = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    spans = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilations, strict=True)]
    begin, end = _pads(node, x, spans, strides)
    convolve: Any = {1: functional.conv1d, 2: functional.conv2d}[axes]
    if begin != end:
        x, begin = functional.pad(x, _widths(begin, end)), [0] * axes
    return convolve(x, weight, bias, strides, begin, dilations, node.get("group", 1))  # type: ignore[no-any-return]


@operator("MaxPool")
def _max_pool(node: Node, x: Tensor) -> Tensor:
    refuse_attributes(
        node,
        dict.fromkeys(("kernel_shape", "strides", "pads", "dilations", "auto_pad", "storage_order", "ceil_mode"), ...),
    )
    kernel = node.get("kernel_shape")
    strides = node.get("strides", [1] * len(kernel))
    begin, end = _pads(node, x, kernel, strides)
    if begin != end:
        x, begin = functional.pad(x, _widths(begin, end), value=torch.finfo(x.dtype).min), [0] * len(kernel)
    return functional.max_pool2d(x, kernel, strides, begin, node.get("dilations", 1), bool(node.get("ceil_mode", 0)))


@operator("AveragePool")
def _average_pool(node: Node, x: Tensor) -> Tensor:
    names = ("kernel_shape", "strides", "pads", "auto_pad", "count_include_pad", "ceil_mode")
    refuse_attributes(node, {**dict.fromkeys(names, ...), "dilations": [1, 1]})
    kernel = node.get("kernel_shape")
    strides = node.get("strides", [1] * len(kernel))
    begin, end = _pads(node, x, kernel, strides)
    if begin != end:
        raise ConversionError(
            f"AveragePool (node {node.name!r}) with pads {begin} and {end}",
            hint="profile this bundle with a runtime that reads ONNX (onnxruntime, openvino)",
        )
    ceil, count = bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    return functional.avg_pool2d(x, kernel, strides, begin, ceil, count)


@operator("GlobalAveragePool")
def _global_average_pool(node: Node, x: Tensor) -> Tensor:
    refuse_attributes(node, {})
    return x.mean(dim=list(range(2, x.ndim)), keepdim=True)


def _pads(node: Node, x: Tensor, spans: list[int], strides: list[int]) -> tuple[list[int], list[int]]:
    """Return how many zeros go before and after each axis of a picture."""
    axes = len(spans)
    kind = node.get("auto_pad", "NOTSET")
    if kind in ("NOTSET", "VALID"):
        pads = node.get("pads", [0] * (2 * axes)) if kind == "NOTSET" else [0] * (2 * axes)
        return list(pads[:axes]), list(pads[axes:])
    totals = [
        max(0, (-(-size // stride) - 1) * stride + span - size)
        for size, stride, span in zip(x.shape[2:], strides, spans, strict=True)
    ]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (small, large) if kind == "SAME_UPPER" else (large, small)


def _widths(begin: list[int], end: list[int]) -> list[int]:
    """Return the widths as torch's pad takes them: the last axis first."""
    return [width for pair in zip(reversed(begin), reversed(end), strict=True) for width in pair]
