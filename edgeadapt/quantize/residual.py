"""What 4 bits leave of a weight, as far as a low rank holds it: an adapter that repairs the base beside the others.

For a layer with the weight W float32[out, in], rounded to Q, the error is E = W - Q, and what of it reaches the output
is E x. The rank-r part of E that takes most of that away is U U^T E, where U float32[out, r] are the leading
eigenvectors of E H E^T and H = E[x x^T] (Eckart and Young in the metric of the inputs, as in EoRA, arXiv:2410.21271).
An adapter's slot takes it at no further node: A = E^T U, B = U^T, appended along the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeadapt.quantize.gptq import DAMPING
from edgeadapt.quantize.scheme import Stored
from edgeadapt.quantize.weights import Weight

Float = NDArray[np.float32]
_SPARE, _ROUNDS = 8, 4


@dataclass
class Residual:
    """The parts of rank `rank` of what rounding left at modules `paths`, collected while a graph is quantized.

    found: by module path (a float32[in, rank], b float32[rank, out])
    """

    rank: int
    paths: frozenset[str]
    found: dict[str, tuple[Float, Float]] = field(default_factory=dict)

    def take(self, uses: Sequence[Weight], stored: Stored, moment: Callable[[], Float] | None) -> None:
        """Take what was left of one constant that was just stored."""
        wanted = sorted({use.path for use in uses} & self.paths)
        if stored.error is None or not wanted:
            return
        pair = low_rank(stored.error(), None if moment is None else moment(), self.rank)
        self.found |= dict.fromkeys(wanted, pair)


def low_rank(error: Float, moment: Float | None, rank: int) -> tuple[Float, Float]:
    """Return A float32[in, rank] and B float32[rank, out], so that x A B is the best part of x error^T of that rank.

    Args:
        error: float32[out, in].
        moment: float32[in, in], E[x x^T] of the layer's input; None counts every input the same.
        rank: at most min(out, in) is used.

    By subspace iteration from a fixed start: the same arguments give the same bits.
    """
    rank = min(rank, *error.shape)
    weighed = _weighed(error, moment)
    start = np.random.default_rng(0).standard_normal((len(error), min(rank + _SPARE, len(error))), np.float32)
    basis = np.linalg.qr(weighed @ (error.T @ start))[0]
    for _ in range(_ROUNDS):
        basis = np.linalg.qr(weighed @ (error.T @ basis))[0]
    _, vectors = np.linalg.eigh(basis.T @ (weighed @ (error.T @ basis)))
    leading = np.ascontiguousarray((basis @ vectors[:, ::-1])[:, :rank])
    return np.ascontiguousarray(error.T @ leading), np.ascontiguousarray(leading.T)


def _weighed(error: Float, moment: Float | None) -> Float:
    """Return error H float32[out, in], H damped like the rounding's."""
    if moment is None:
        return error
    mean = float(np.trace(moment, dtype=np.float64)) / len(moment)
    return np.asarray(error @ moment + np.float32(DAMPING * mean) * error)
