"""Operators of ai.onnx, as edgeadapt's graphs use them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from .graph import ConversionError, Node
from .operator_table import OPERATORS, Operator, Tensor, operator, refuse_attributes

_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
}

_PLAIN: dict[str, Any] = {
    "Abs": torch.abs,
    "Cos": torch.cos,
    "Div": lambda a, b: torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Identity": lambda a: a,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "And": torch.logical_and,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Add": torch.add,
    "Tanh": torch.tanh,
    "Where": torch.where,
}


def _plain(function: Any) -> Any:
    def compute(node: Node, *inputs: Tensor) -> Any:
        refuse_attributes(node, {})
        return function(*inputs)

    return compute


OPERATORS.update({("", name): Operator(_plain(function)) for name, function in _PLAIN.items()})


@operator("Pow")
def _pow(_node: Node, x: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(x, exponent.to(x.dtype))


@operator("Cast")
def _cast(node: Node, x: Tensor) -> Tensor:
    if node.get("to") not in _DTYPES:
        raise ConversionError(
            f"Cast (node {node.name!r}) to ONNX's type {node.get('to')}, which this conversion does not know",
            hint="profile this bundle with a runtime that reads ONNX (onnxruntime, openvino)",
        )
    dtype = _DTYPES[node.get("to")]
    # Runtimes compute in float32; what the graph holds in half precision keeps its values.
    return x.to(torch.float32 if dtype in (torch.float16, torch.float64) else dtype)


@operator("Constant")
def _constant(node: Node) -> Tensor:
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if name in node.attributes:
            array = np.asarray(node.get(name))
            kind = {"value_float": np.float32, "value_floats": np.float32}.get(name, array.dtype)
            return torch.from_numpy(np.array(array, dtype=kind))
    raise ConversionError(
        f"Constant (node {node.name!r}) holds none of the known values", hint="run `edgeadapt verify` on the bundle"
    )


@operator("ConstantOfShape", settings=(0,))
def _constant_of_shape(node: Node, shape: list[int]) -> Tensor:
    value = np.asarray(node.get("value", np.zeros(1, np.float32))).reshape(-1)
    return torch.from_numpy(np.full(shape, value[0], value.dtype))


@operator("Gelu")
def _gelu(node: Node, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=node.get("approximate", "none"))


@operator("LeakyRelu")
def _leaky_relu(node: Node, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, node.get("alpha", 0.01))


@operator("Softmax")
def _softmax(node: Node, x: Tensor) -> Tensor:
    return torch.softmax(x, node.get("axis", -1))


@operator("Clip")
def _clip(_node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if low is not None:
        x = torch.maximum(x, low.to(x.dtype))
    return x if high is None else torch.minimum(x, high.to(x.dtype))


def _transposed(_node: Node, weight: Any) -> Any:
    return np.ascontiguousarray(weight.T) if weight.ndim == 2 else weight


@operator("MatMul", prepare=_transposed, prepared=(1,))
def _mat_mul(node: Node, x: Tensor, weight: Tensor, *, prepared: bool = False) -> Tensor:
    """Multiply; a weight that is known comes as float32[out, in], which runtimes know as a linear layer."""
    refuse_attributes(node, {})
    return functional.linear(x, weight) if prepared and weight.ndim == 2 else torch.matmul(x, weight)


def _gemm_weight(node: Node, weight: Any) -> Any:
    return np.ascontiguousarray(weight if node.get("transB", 0) else weight.T)


@operator("Gemm", prepare=_gemm_weight, prepared=(1,))
def _gemm(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, prepared: bool = False) -> Tensor:
    refuse_attributes(node, {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": ...})
    if prepared:
        return functional.linear(x, weight, bias)
    # a weight that an adapter brings is no constant of a linear layer, which a runtime would want to round
    found = torch.matmul(x, weight.T if node.get("transB", 0) else weight)
    return found if bias is None else found + bias


@operator("Shape")
def _shape(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[node.get("start", 0) : node.get("end", x.ndim)], dtype=torch.int64)


@operator("Gather")
def _gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = node.get("axis", 0) % x.ndim
    if axis == 0 and x.ndim == 2 and indices.ndim > 0:
        return functional.embedding(indices, x)
    found = torch.index_select(x, axis, indices.reshape(-1))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@operator("GatherND")
def _gather_nd(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    refuse_attributes(node, {"batch_dims": 0})
    return x[tuple(indices[..., axis] for axis in range(indices.shape[-1]))]


@operator("Range")
def _range(_node: Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    values = torch.arange(start.item(), limit.item(), delta.item())
    return values.to(start.dtype)


@operator("Slice", settings=(1, 2, 3, 4))
def _slice(_node: Node, x: Tensor, starts: Any, ends: Any, axes: Any | None = None, steps: Any | None = None) -> Tensor:
    for index, axis in enumerate(range(len(starts)) if axes is None else axes):
        step = 1 if steps is None else steps[index]
        if step < 1:
            raise ConversionError(
                "Slice with a negative step", hint="profile this bundle with a runtime that reads ONNX"
            )
        length = x.shape[axis]
        start, end = (max(0, edge + length) if edge < 0 else min(edge, length) for edge in (starts[index], ends[index]))
        if (start, end, step) != (0, length, 1):
            x = x[(slice(None),) * (axis % x.ndim) + (slice(start, max(start, end), step),)]
    return x


@operator("Split", settings=(1,))
def _split(node: Node, x: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, ...]:
    axis = node.get("axis", 0)
    if sizes is None:
        parts = node.get("num_outputs", len(node.outputs))
        sizes = -(-x.shape[axis] // parts)
    return torch.split(x, sizes, axis)


@operator("Concat")
def _concat(node: Node, *parts: Tensor) -> Tensor:
    return torch.cat(parts, node.get("axis"))


@operator("Reshape", settings=(1,))
def _reshape(node: Node, x: Tensor, shape: list[int]) -> Tensor:
    if not node.get("allowzero", 0):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return x.reshape(shape)


@operator("Flatten")
def _flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


@operator("Transpose")
def _transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(*node.get("perm", list(range(x.ndim))[::-1]))


@operator("Squeeze", settings=(1,))
def _squeeze(_node: Node, x: Tensor, axes: list[int] | None = None) -> Tensor:
    drop = {axis % x.ndim for axis in axes} if axes is not None else {i for i, size in enumerate(x.shape) if size == 1}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in drop])


@operator("Unsqueeze", settings=(1,))
def _unsqueeze(_node: Node, x: Tensor, axes: list[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Expand", settings=(1,))
def _expand(_node: Node, x: Tensor, shape: list[int]) -> Tensor:
    rank = max(x.ndim, len(shape))
    have, want = [1] * (rank - x.ndim) + list(x.shape), [1] * (rank - len(shape)) + shape
    return x.reshape(have).expand([max(a, b) for a, b in zip(have, want, strict=True)])


@operator("Tile", settings=(1,))
def _tile(_node: Node, x: Tensor, repeats: list[int]) -> Tensor:
    return x.repeat(repeats)


@operator("Pad", settings=(1, 2, 3))
def _pad(node: Node, x: Tensor, pads: list[int], value: Any = None, axes: list[int] | None = None) -> Tensor:
    refuse_attributes(node, {"mode": "constant"})
    chosen = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in axes]
    widths = [0] * (2 * x.ndim)
    for index, axis in enumerate(chosen):
        widths[2 * (x.ndim - 1 - axis)] = pads[index]
        widths[2 * (x.ndim - 1 - axis) + 1] = pads[index + len(chosen)]
    fill = 0.0 if value is None else float(np.asarray(value).reshape(-1)[0])
    return functional.pad(x, widths, value=fill)


_REDUCE: dict[str, Any] = {
    "ReduceSum": torch.sum,
    "ReduceMean": torch.mean,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
}


def _reduce(function: Any) -> Any:
    def compute(node: Node, x: Tensor, axes: list[int] | None = None) -> Tensor:
        refuse_attributes(node, {"keepdims": ..., "noop_with_empty_axes": ..., "axes": ...})
        chosen = node.get("axes") if axes is None else axes
        if not chosen:
            if node.get("noop_with_empty_axes", 0):
                return x
            chosen = list(range(x.ndim))
        return function(x, dim=chosen, keepdim=bool(node.get("keepdims", 1)))  # type: ignore[no-any-return]

    return compute


OPERATORS.update({("", name): Operator(_reduce(function), settings=(1,)) for name, function in _REDUCE.items()})


@operator("ArgMax")
def _arg_max(node: Node, x: Tensor) -> Tensor:
    refuse_attributes(node, {"axis": ..., "keepdims": ..., "select_last_index": 0})
    return torch.argmax(x, node.get("axis", 0), keepdim=bool(node.get("keepdims", 1)))


@operator("CumSum", settings=(1,))
def _cum_sum(node: Node, x: Tensor, axis: Any) -> Tensor:
    refuse_attributes(node, {"exclusive": 0, "reverse": 0})
    return torch.cumsum(x, int(np.asarray(axis).reshape(-1)[0]), dtype=x.dtype)


@operator("Trilu", settings=(1,))
def _trilu(node: Node, x: Tensor, diagonal: Any = None) -> Tensor:
    offset = 0 if diagonal is None else int(np.asarray(diagonal).reshape(-1)[0])
    return torch.triu(x, offset) if node.get("upper", 1) else torch.tril(x, offset)


@operator("LayerNormalization")
def _layer_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    refuse_attributes(node, {"axis": ..., "epsilon": ..., "stash_type": 1})
    _last_axis(node, x)
    return functional.layer_norm(x, x.shape[-1:], scale.reshape(-1), bias, node.get("epsilon", 1e-5))


@operator("SimplifiedLayerNormalization", "RMSNormalization")
def _rms_norm(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    refuse_attributes(node, {"axis": ..., "epsilon": ..., "stash_type": 1})
    _last_axis(node, x)
    return rms_norm(x, scale, node.get("epsilon", 1e-5))


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """Return x over the root of its mean square along the last axis, times `scale`."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * scale


def _last_axis(node: Node, x: Tensor) -> None:
    if node.get("axis", -1) % x.ndim != x.ndim - 1:
        raise ConversionError(
            f"{node.label} (node {node.name!r}) normalizes other axes than the last",
            hint="profile this bundle with a runtime that reads ONNX (onnxruntime, openvino)",
        )


@operator("BatchNormalization")
def _batch_norm(node: Node, x: Tensor, *statistics: Tensor) -> Tensor:
    """Return the norm; `statistics`: scale, bias, mean, variance."""
    refuse_attributes(node, {"epsilon": ..., "momentum": ..., "training_mode": 0})
    scale, bias, mean, variance = statistics
    return functional.batch_norm(x, mean, variance, scale, bias, training=False, eps=node.get("epsilon", 1e-5))
