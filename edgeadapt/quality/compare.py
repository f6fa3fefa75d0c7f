"""One case's outputs against the reference's: how far off, how differently distributed, the same answer or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import ExportError

Array = NDArray[Any]
ELEMENTS_AT_ONCE = 1 << 18
"""Logits that are taken to float64 at a time: all of a case would take some hundred MB."""
LOGITS = "logits"
"""The output that is a distribution over its last axis."""


@dataclass(frozen=True)
class Comparison:
    """How `measured` differs from `reference` on one case; masked positions are left out everywhere.

    absolute_errors: by output, the largest absolute difference
    relative_errors: by output, that divided by the reference's largest magnitude (as it is where that is 0)
    kl: float64[positions], KL(reference || measured) in nats, of logits with at least two classes; None without them
    agrees: bool[positions], whether the largest logit is the same one; None without logits
    cosines: float64[vectors], cosine similarity of the other outputs' vectors; None where there are only logits
    """

    absolute_errors: Mapping[str, float]
    relative_errors: Mapping[str, float]
    kl: NDArray[np.float64] | None
    agrees: NDArray[np.bool_] | None
    cosines: NDArray[np.float64] | None

    @property
    def worst(self) -> tuple[str, float]:
        """The output with the largest relative error, and that error."""
        name = max(self.relative_errors, key=lambda key: self.relative_errors[key])
        return name, self.relative_errors[name]


def output_mask(case: Mapping[str, Array]) -> Array | None:
    """Return the mask int64[batch, seq] of a case's outputs, or None: a decoder's own mask, never its encoder's."""
    return case.get("decoder_attention_mask") if "decoder_input_ids" in case else case.get("attention_mask")


def compare(reference: Mapping[str, Array], measured: Mapping[str, Array], mask: Array | None = None) -> Comparison:
    """Return how far `measured` is from `reference`.

    Args:
        reference: arrays by output name; those that `measured` lacks are not compared.
        measured: arrays by output name.
        mask: int64[batch, seq], 0 where outputs float32[batch, seq, ...] mean nothing.

    Raises:
        ExportError: if an output has no reference, or another shape than it.
    """
    _check_outputs(reference, measured)
    pairs = {name: _valid(reference[name], measured[name], mask) for name in measured}
    absolute = {name: _largest_difference(*pair) for name, pair in pairs.items()}
    scales = {name: _largest_magnitude(pair[0]) for name, pair in pairs.items()}
    vectors = [pair for name, pair in pairs.items() if name != LOGITS and pair[0].ndim > 1]
    logits = pairs.get(LOGITS)
    distributed = logits is not None and logits[0].ndim > 1 and logits[0].shape[-1] > 1
    return Comparison(
        absolute_errors=absolute,
        relative_errors={name: _ratio(absolute[name], scales[name]) for name in pairs},
        kl=kl_divergence(*logits) if distributed and logits is not None else None,
        agrees=_agreement(*logits) if distributed and logits is not None else None,
        cosines=np.concatenate([_cosines(*pair) for pair in vectors]) if vectors else None,
    )


def kl_divergence(reference: Array, measured: Array) -> NDArray[np.float64]:
    """Return KL(softmax(reference) || softmax(measured)) over the last axis in nats, one number per position."""
    expected, found = (x.reshape(-1, x.shape[-1]) for x in (reference, measured))
    rows = max(1, ELEMENTS_AT_ONCE // max(1, expected.shape[-1]))
    parts = [_divergence(expected[i : i + rows], found[i : i + rows]) for i in range(0, len(expected), rows)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _divergence(reference: Array, measured: Array) -> NDArray[np.float64]:
    expected, found = _log_softmax(reference), _log_softmax(measured)
    probabilities = np.exp(expected)
    # 0 * (-inf - x) is 0 by definition: a class that the reference rules out adds nothing.
    with np.errstate(invalid="ignore"):
        terms = np.where(probabilities > 0, probabilities * (expected - found), 0.0)
    divergence = terms.sum(axis=-1)
    # Rounding can leave a tiny negative sum for equal distributions; NaN must stay visible.
    return np.asarray(np.where(divergence < 0, 0.0, divergence), np.float64)


def _check_outputs(reference: Mapping[str, Array], measured: Mapping[str, Array]) -> None:
    if not measured:
        raise ExportError("the graph has no output to compare", hint="this is a bug; please report it")
    for name, array in measured.items():
        if name not in reference:
            raise ExportError(
                f"output {name!r} of the graph is no output of the original, which has {', '.join(sorted(reference))}",
                hint="give the graph's outputs the original's names",
            )
        if reference[name].shape != array.shape:
            raise ExportError(
                f"output {name!r} has the shape {list(array.shape)}, the original's has {list(reference[name].shape)}",
                hint="an axis was fixed when the graph was traced; export with other example inputs",
            )


def _valid(reference: Array, measured: Array, mask: Array | None) -> tuple[Array, Array]:
    """Return both without masked positions, [valid, ...] where the mask applies."""
    if mask is None or reference.ndim < 3 or reference.shape[:2] != mask.shape:
        return reference, measured
    keep = np.asarray(mask, np.bool_)
    if keep.all():  # the usual case, without copies
        shape = (-1, *reference.shape[2:])
        return reference.reshape(shape), measured.reshape(shape)
    return reference[keep], measured[keep]


def _largest_difference(reference: Array, measured: Array) -> float:
    """Return the largest absolute difference; infinity if either has a NaN or an infinity that the other lacks."""
    if reference.size == 0:
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.asarray(measured - reference)
    if not np.isfinite(difference).all():
        # Equal infinities are no difference.
        difference = np.zeros(reference.shape, np.float64)
        np.subtract(measured, reference, out=difference, where=reference != measured)
    largest = float(np.abs(difference, out=difference).max())
    return largest if np.isfinite(largest) else float("inf")


def _largest_magnitude(values: Array) -> float:
    """Return the largest magnitude of the finite values, 0 without any."""
    finite = np.isfinite(values)
    found = values if finite.all() else values[finite]
    return max(float(found.max(initial=0)), -float(found.min(initial=0)))


def _ratio(error: float, scale: float) -> float:
    return error / scale if scale > 0 else error


def _log_softmax(values: Array) -> NDArray[np.float64]:
    shifted = values.astype(np.float64) - values.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float64)


def _agreement(reference: Array, measured: Array) -> NDArray[np.bool_]:
    same = reference.argmax(axis=-1) == measured.argmax(axis=-1)
    # argmax of a row with NaN is the NaN's place: never an agreement.
    return np.asarray(same & np.isfinite(measured.max(axis=-1)), np.bool_).reshape(-1)


def _cosines(reference: Array, measured: Array) -> NDArray[np.float64]:
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (reference, measured))
    equal = (a == b).all(axis=-1)
    a, b = np.where(equal[:, None], 0.0, a), np.where(equal[:, None], 0.0, b)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    products = (a * b).sum(axis=-1)
    return np.where(equal, 1.0, np.divide(products, norms, out=np.zeros_like(products), where=norms > 0))
