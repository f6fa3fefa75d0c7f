"""Ranks and whole sites of an adapter that hardly matter, left out: the arithmetic, on numpy alone.

A site adds h B to its module's output, where h = x A has one number per rank. With the second moments of h and of the
loss's gradient there, ranks can be turned (h -> h T) until they are independent and sorted by what they do to the
model's answer: half the expected square of gradient times change is, to second order, the KL divergence that leaving
one out costs (the empirical Fisher information, as in optimal brain damage, LeCun et al. 1989).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate

Matrix = NDArray[np.float64]

SITE_COST = 16
"""A site's nodes take as long in a decoder's step as about so many ranks (docs/decisions/0010)."""
_PRIOR = 0.01
"""How much of the moments is taken from the factors themselves: samples do not show every input there will be."""


@dataclass(frozen=True)
class Sensitivity:
    """What samples say of one site's ranks.

    moments: float64[rank, rank], the mean of h hT over the site's inputs
    gradients: float64[rank, rank], the sum of g gT over those inputs, g the loss's gradient at h, for each answer
    """

    moments: Matrix
    gradients: Matrix


@dataclass(frozen=True)
class Spectrum:
    """A site's term with its ranks turned and sorted.

    a, b: as in `SiteUpdate`; the first k ranks are the best k
    kl: float64[rank], what leaving each out is expected to cost in nats, descending
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    kl: Matrix


def spectrum(update: SiteUpdate, sensitivity: Sensitivity) -> Spectrum:
    """Return the ranks of a site's low-rank term, sorted by what leaving them out costs."""
    assert update.a is not None
    assert update.b is not None
    a, b = _as_matrices(update.a, update.b)
    root, inverse = _roots(_with_prior(sensitivity.moments, a.T @ a))
    effect = root @ _with_prior(sensitivity.gradients, b @ b.T) @ root.T
    values, turn = np.linalg.eigh((effect + effect.T) / 2)
    turn = turn[:, ::-1]
    kl = np.maximum(values[::-1], 0.0) / 2
    return Spectrum(*_as_tensors(a @ (inverse @ turn), (turn.T @ root) @ b, update), kl)


def expected_kl(spectra: Mapping[str, Spectrum], price: float) -> float:
    """Return what `pruned` at this price is expected to cost in nats, as the sum over all that is left out."""
    return float(sum(item.kl[_kept(item.kl, price) :].sum() for item in spectra.values()))


def pruned(adapter: ResolvedAdapter, spectra: Mapping[str, Spectrum], price: float) -> ResolvedAdapter:
    """Return the adapter without the ranks that cost less than `price` nats each to leave out.

    A site keeps its gains and its offset. Where nothing remains it is gone; a whole site counts `SITE_COST` ranks.
    """
    sites = {}
    for path, update in adapter.sites.items():
        if path not in spectra:
            sites[path] = update
            continue
        item = spectra[path]
        kept = _kept(item.kl, price)
        if kept == len(item.kl):
            sites[path] = update
        elif kept:
            a, b = _first(item, kept)
            sites[path] = replace(update, a=a, b=b)
        elif (rest := replace(update, a=None, b=None)).terms:
            sites[path] = rest
    return replace(adapter, sites=sites)


def _kept(kl: Matrix, price: float) -> int:
    """Return how many ranks make the sum of lost KL and price paid smallest."""
    lost = np.append(np.cumsum(kl[::-1])[::-1], 0.0)  # lost[k]: what leaving out all but the first k costs
    paid = price * (np.arange(len(kl) + 1) + SITE_COST)
    paid[0] = 0.0
    return int(np.argmin(lost + paid))


def _with_prior(measured: Matrix, own: Matrix) -> Matrix:
    scale = np.trace(own)
    return measured + own * (_PRIOR * np.trace(measured) / scale) if scale > 0 else measured


def _roots(moments: Matrix) -> tuple[Matrix, Matrix]:
    """Return R and its inverse with RT R = moments; directions that never occur are left out of both."""
    values, vectors = np.linalg.eigh((moments + moments.T) / 2)
    seen = values > max(values.max(initial=0.0), 0.0) * 1e-12
    lengths, vectors = np.sqrt(values[seen]), vectors[:, seen]
    return lengths[:, None] * vectors.T, vectors / lengths


def _as_matrices(a: NDArray[Any], b: NDArray[Any]) -> tuple[Matrix, Matrix]:
    """Return A float64[in, rank] and B float64[rank, out]; a convolution's kernel counts as its input."""
    if b.ndim == 4:
        return a.reshape(len(a), -1).T.astype(np.float64), b.reshape(b.shape[:2]).T.astype(np.float64)
    return a.astype(np.float64), b.astype(np.float64)


def _as_tensors(a: Matrix, b: Matrix, like: SiteUpdate) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    assert like.a is not None
    assert like.b is not None
    if like.b.ndim == 4:
        kernel = np.ascontiguousarray(a.T, np.float32).reshape(-1, *like.a.shape[1:])
        return kernel, np.ascontiguousarray(b.T, np.float32).reshape(len(like.b), -1, 1, 1)
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)


def _first(item: Spectrum, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if item.b.ndim == 4:
        return item.a[:count], np.ascontiguousarray(item.b[:, :count])
    return np.ascontiguousarray(item.a[:, :count]), item.b[:count]
