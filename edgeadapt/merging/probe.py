"""A layer's weight and bias in effect, read off its own forward: f(0) is the bias, f(I) - f(0) the weight.

Nothing here knows what an adapter computes, only that the result must be a product: that is proven with other inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from edgeadapt.adapters.adapter import Effective, TargetModule
from edgeadapt.errors import AdapterError

TOLERANCE = 1e-4
"""The largest error of the product that was read, relative to the largest output, on random inputs."""
_PIECE = 1 << 22  # numbers that a layer is given at once
_Forward = Callable[[torch.Tensor], torch.Tensor]


class NotAProductError(Exception):
    """A layer's forward is no product with a weight plus a bias."""


def probe(layer: nn.Module, target: TargetModule, plain: nn.Module) -> Effective:
    """Return the weight and bias that `layer` computes with.

    Args:
        layer: what stands in the place of the base's module, an adapter inside.
        target: the base's module.
        plain: the base's module in torch: its stride and padding, where it is a convolution.

    Raises:
        NotAProductError: if the layer does not compute a product.
        AdapterError: if the layer cannot be read: it is of another type, or dilated.
    """
    with torch.no_grad():
        if target.type in ("linear", "conv1d"):
            return _linear(layer, target)
        if target.type == "embedding":
            return _embedding(layer, target)
        if target.type == "conv2d":
            assert isinstance(plain, nn.Conv2d)
            return _conv2d(layer, target, plain)
    raise AdapterError(
        f"module {target.path!r} is a {target.class_name}, whose weight in effect cannot be read",
        hint="exclude the module and train again, or merge the adapter with peft and use the result as a base",
    )


def _linear(layer: _Forward, target: TargetModule) -> Effective:
    inputs = target.in_features
    bias = layer(torch.zeros(1, 1, inputs))[0, 0].clone()
    scale = _scale(bias, target)
    weight = torch.empty(inputs, target.out_features)
    for rows in _pieces(inputs, max(inputs, target.out_features)):
        unit = torch.zeros(1, len(rows), inputs)
        unit[0, range(len(rows)), rows] = scale
        weight[rows.start : rows.stop] = (layer(unit)[0] - bias) / scale
    _prove(layer, lambda x: x @ weight + bias, (_random(1, 7, inputs), _random(2, 3, inputs)))
    return _effective(weight if target.type == "conv1d" else weight.T, bias, has_bias=target.has_bias)


def _embedding(layer: _Forward, target: TargetModule) -> Effective:
    rows, width = target.weight_shape
    table = torch.empty(rows, width)
    for piece in _pieces(rows, width):
        table[piece.start : piece.stop] = layer(torch.arange(piece.start, piece.stop)[None])[0]
    ids = torch.randint(0, rows, (2, 16), generator=torch.Generator().manual_seed(0))
    _prove(layer, lambda x: table[x], (ids,))
    if target.output_scale is not None:
        table /= target.output_scale
    return Effective(table.numpy())


def _conv2d(layer: _Forward, target: TargetModule, plain: nn.Conv2d) -> Effective:
    """Read a kernel with one impulse per input channel and tap, at an output place that no padding reaches."""
    if (plain.dilation != (1, 1) and plain.kernel_size != (1, 1)) or plain.padding_mode != "zeros":
        raise AdapterError(
            f"module {target.path!r} is a convolution with dilation {plain.dilation} and padding mode "
            f"{plain.padding_mode!r}, where adapters cannot be read",
            hint="exclude the module and train again",
        )
    padding = (0, 0) if isinstance(plain.padding, str) else plain.padding
    if plain.padding == "same":
        padding = ((plain.kernel_size[0] - 1) // 2, (plain.kernel_size[1] - 1) // 2)
    at = [-(-p // s) for p, s in zip(padding, plain.stride, strict=True)]
    start = [o * s - p for o, s, p in zip(at, plain.stride, padding, strict=True)]
    size = [first + k for first, k in zip(start, plain.kernel_size, strict=True)]
    out, group_inputs, height, width = target.weight_shape
    bias = layer(torch.zeros(1, target.in_features, *size))[0, :, at[0], at[1]].clone()
    scale = _scale(bias, target)
    taps = target.in_features * height * width
    answers = torch.empty(taps, out)
    for piece in _pieces(taps, target.in_features * size[0] * size[1]):
        index = torch.arange(piece.start, piece.stop)
        x = torch.zeros(len(piece), target.in_features, *size)
        channel, tap = index // (height * width), index % (height * width)
        x[torch.arange(len(piece)), channel, start[0] + tap // width, start[1] + tap % width] = scale
        answers[piece.start : piece.stop] = (layer(x)[:, :, at[0], at[1]] - bias) / scale
    whole = answers.reshape(target.in_features, height, width, out).permute(3, 0, 1, 2)
    weight = torch.cat(
        [
            rows[:, group * group_inputs : (group + 1) * group_inputs]
            for group, rows in enumerate(whole.chunk(target.groups))
        ]
    ).contiguous()

    def product(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, weight, bias, plain.stride, plain.padding, plain.dilation, plain.groups)

    _prove(layer, product, (_random(2, target.in_features, size[0] + 4, size[1] + 5),))
    return _effective(weight, bias, has_bias=target.has_bias)


def _effective(weight: torch.Tensor, bias: torch.Tensor, *, has_bias: bool) -> Effective:
    return Effective(weight.contiguous().numpy(), bias.numpy() if has_bias or bool(bias.any()) else None)


def _scale(bias: torch.Tensor, target: TargetModule) -> float:
    """Return the power of two to probe with, so that a large bias does not swallow the weight's digits."""
    assert target.weight is not None
    weight, largest = float(np.abs(target.weight()).max(initial=0.0)), float(bias.abs().max())
    return float(2.0 ** np.ceil(np.log2(64 * largest / weight))) if largest and weight and largest < np.inf else 1.0


def _pieces(count: int, width: int) -> Iterator[range]:
    step = max(1, _PIECE // width)
    for start in range(0, count, step):
        yield range(start, min(start + step, count))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _prove(layer: _Forward, product: _Forward, inputs: tuple[torch.Tensor, ...]) -> None:
    """Check `product` against the layer's own forward."""
    for x in inputs:
        want = layer(x)
        got = product(x)
        error = float((got - want).abs().max()) if got.shape == want.shape else float("inf")
        if not error <= TOLERANCE * float(want.abs().max()):
            raise NotAProductError
