"""An adapter without the ranks and sites that hardly matter: as many left out as a budget of measured KL allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt import bundle as bundles
from edgeadapt.adapters.adapter import ResolvedAdapter
from edgeadapt.adapters.prune import Sensitivity, expected_kl, pruned, spectrum
from edgeadapt.bundle.manifest import Pruning
from edgeadapt.errors import QuantizeError
from edgeadapt.quality.compare import LOGITS, compare, output_mask

Array = NDArray[Any]

_TRIES = 6
_NEAR = 0.85
"""A share of the budget that is close enough to it: the next try would win little."""
_NARROW = 0.99
"""Between two expectations that are so close nothing is to be won."""
_STEPS = 60


def prune(
    session: Any,
    adapter: ResolvedAdapter,
    sensitivities: Mapping[str, Sensitivity],
    cases: Sequence[Mapping[str, Array]],
    prune_kl: float,
) -> tuple[ResolvedAdapter, Pruning]:
    """Return the smallest adapter found whose answers differ from the whole one's by at most `prune_kl`, and a record.

    What goes first is told by the sensitivities; how much may go is measured: at most `_TRIES` runs over the cases.

    Args:
        session: a session over a bundle that takes the adapter, best an unquantized one: rounding in quantized
            kernels answers to any change with noise of its own.
        adapter: the adapter.
        sensitivities: by site, see `export.sensitivity`; sites without one are left alone.
        cases: inputs by name.
        prune_kl: the largest mean KL divergence in nats.

    Raises:
        QuantizeError: if the model gives no logits of two or more classes.
    """
    spectra = {path: spectrum(adapter.sites[path], item) for path, item in sensitivities.items()}
    whole = _outputs(session, adapter, cases)
    best, best_kl = adapter, 0.0
    # In the logarithm of what is expected, what is measured is close to a line of slope 1.
    aim, low, high = prune_kl, 0.0, math.inf
    tries = 0
    while spectra and tries < _TRIES and low < _NARROW * high:
        candidate = pruned(adapter, spectra, _price_of(spectra, aim))
        measured = 0.0  # if nothing is left out
        if 0 < _size(candidate) < _size(adapter):
            measured = _mean_kl(whole, _outputs(session, candidate, cases), cases)
            tries += 1
        elif not _size(candidate):
            measured = math.inf
        if measured > prune_kl:
            high = aim
        else:
            low = aim
            if _size(candidate) < _size(best):
                best, best_kl = candidate, measured
            if measured >= _NEAR * prune_kl:
                break
        aim = _next(aim, measured, prune_kl, low, high)
    return best, Pruning(
        max_kl=prune_kl,
        kl=best_kl,
        ranks_before=_ranks(adapter),
        ranks=_ranks(best),
        sites_before=len(adapter.sites),
        sites=len(best.sites),
        parameters_before=_size(adapter),
        parameters=_size(best),
    )


def _price_of(spectra: Mapping[str, Any], expected: float) -> float:
    """Return the highest price at which the expected loss is at most `expected`."""
    largest = max((float(item.kl.sum()) for item in spectra.values()), default=0.0)
    low, high = -60.0, math.log(max(largest, 1e-300)) + 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if expected_kl(spectra, math.exp(middle)) <= expected:
            low = middle
        else:
            high = middle
    return math.exp(low)


def _next(aim: float, measured: float, budget: float, low: float, high: float) -> float:
    """Return the next expectation to try: scaled by how far the last was off, inside of what is known."""
    guess = aim * budget / measured if 0 < measured < math.inf else aim * (10.0 if measured == 0 else 0.1)
    if low < guess < high:
        return guess
    return math.sqrt(low * high) if low > 0 and high < math.inf else aim * (2.0 if guess >= high else 0.5)


def _outputs(
    session: Any, adapter: ResolvedAdapter, cases: Sequence[Mapping[str, Array]]
) -> list[dict[str, NDArray[Any]]]:
    name = f"({adapter.name})"  # no adapter of a bundle has such a name
    session.use(None)
    session.lend(name, bundles.bind(adapter, session.bundle.manifest))
    session.use(name)
    try:
        return [session.run(case) for case in cases]
    finally:
        session.use(None)
        session.evict(name)


def _mean_kl(
    whole: Sequence[Mapping[str, Array]], found: Sequence[Mapping[str, Array]], cases: Sequence[Mapping[str, Array]]
) -> float:
    parts = []
    for reference, measured, case in zip(whole, found, cases, strict=True):
        logits = {LOGITS: measured[LOGITS]} if LOGITS in measured else {}
        kl = compare(reference, logits, output_mask(case)).kl if logits else None
        if kl is None:
            raise QuantizeError(
                "prune_kl compares distributions, and this model gives no logits of two or more classes",
                hint="leave prune_kl out",
            )
        parts.append(kl)
    return float(np.concatenate(parts).mean())


def _size(adapter: ResolvedAdapter) -> int:
    return adapter.parameter_count


def _ranks(adapter: ResolvedAdapter) -> int:
    return sum(update.rank for update in adapter.sites.values())
