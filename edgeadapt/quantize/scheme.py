"""What a scheme is: one file in `quantize/schemes`, found by its name.

A scheme's file holds

- `SUMMARY`: one line for people;
- `BLOCK_SIZE`: weights that share a scale unless the user says otherwise;
- `usual(weight) -> tuple[str, str]`: the scheme that a weight gets when this one is asked for the whole model, and why
  if it is another one;
- `refuses(weight) -> str | None`: why this scheme cannot hold a weight at all, or None;
- `apply(uses, settings) -> Stored`: rewrite the nodes that use one constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import QuantizeError
from edgeadapt.quantize.rounded import RoundedWeights
from edgeadapt.quantize.weights import Weight

SCHEMES = "edgeadapt.quantize.schemes"

Moments = Mapping[str, NDArray[np.float32]]
"""By module path, float32[in, in]: the mean of x x^T over the inputs x of a linear layer."""


@dataclass(frozen=True)
class Settings:
    """How to store one constant.

    block_size: weights along a row that share a scale
    moment: gives float32[in, in], E[x x^T] of the layer's input on the calibration texts; None if there are none
    memory: what a scheme remembers from one constant to the next within one call
    rounded: weights in 4 bits from earlier calls, if such are kept
    """

    block_size: int
    moment: Callable[[], NDArray[np.float32]] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    rounded: RoundedWeights | None = None


@dataclass(frozen=True)
class Stored:
    """What became of one constant.

    bytes: what the file holds of it now, scales and zero points included
    rounding: "nearest" (each weight by itself), "feedback" (with calibration moments), "float16", or None if untouched
    again: from another matrix in its place (as `Weight.matrix` gives it; a convolution's or float16 weight as it lies)
        to the initializers that hold it, by name: on the same scales and zero points
    error: the weight less what is stored for it, float32[out, in], where that is large enough to count
    """

    bytes: int
    rounding: str | None
    again: Callable[[NDArray[np.float32]], Mapping[str, NDArray[Any]]] | None
    error: Callable[[], NDArray[np.float32]] | None = None


def moment_of(uses: Sequence[Weight], moments: Moments) -> Callable[[], NDArray[np.float32]] | None:
    """Return what gives the moments of a matrix's input; None if there are none.

    They may have to be collected, so that is left until they are needed; a `QuantizeError` is raised then if they are
    damaged or of the wrong shape.
    """
    use = next((use for use in uses if use.kind == "linear" and use.path in moments), None)
    return None if use is None else partial(_checked_moment, use, moments)


def _checked_moment(use: Weight, moments: Moments) -> NDArray[np.float32]:
    moment = moments[use.path]
    width = use.shape[0 if use.transposed else 1]
    if moment.shape == (width, width) and np.isfinite(moment).all():
        return moment
    wrong = "hold NaN or infinity"
    if moment.shape != (width, width):
        wrong = f"have the shape {list(moment.shape)}, expected {[width, width]}"
    raise QuantizeError(f"the calibration moments of {use.path} {wrong}", hint="collect them from this base in float32")


class Scheme(Protocol):
    """The names in a scheme's file."""

    SUMMARY: str
    BLOCK_SIZE: int

    def usual(self, weight: Weight) -> tuple[str, str]:
        """Return (scheme, why) for `weight` when this one is asked for the whole model."""
        ...

    def refuses(self, weight: Weight) -> str | None:
        """Return why `weight` cannot be stored like this, or None."""
        ...

    def apply(self, uses: Sequence[Weight], settings: Settings) -> Stored:
        """Rewrite the nodes in `uses`, which read one initializer the same way round."""
        ...
