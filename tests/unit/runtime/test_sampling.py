from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.runtime.sampling import pick, sampling


def _sorted_whole(logits, options, rng):
    """The same draw by sorting the whole vocabulary."""
    scaled = logits.astype(np.float64) / options.temperature
    order = np.argsort(-scaled, kind="stable")
    if options.top_k:
        order = order[: options.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    if options.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(weights), options.top_p)) + 1
        order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
    drawn = int(np.searchsorted(np.cumsum(weights), rng.random(), side="right"))
    return int(order[min(drawn, len(order) - 1)])


@pytest.mark.parametrize("spread", [0.05, 1, 10])
@pytest.mark.parametrize("size", [5, 300, 5000])
@pytest.mark.parametrize("top_k", [0, 1, 40, 2000])
@pytest.mark.parametrize("top_p", [1, 0.999, 0.5])
def test_looking_at_the_likeliest_tokens_draws_what_sorting_all_draws(spread, size, top_k, top_p):
    """A flat distribution needs more than the first few tokens; rounded logits are equal to one another."""
    rng = np.random.default_rng(0)
    for seed in range(12):
        logits = (rng.normal(size=size) * spread).astype(np.float32)
        if seed % 3 == 0:
            logits = logits.round(1)
        options = sampling({"temperature": 0.8, "top_k": top_k, "top_p": top_p})
        expected = _sorted_whole(logits, options, np.random.default_rng(seed))
        assert pick(logits, options, np.random.default_rng(seed)) == expected


def test_draws_follow_the_distribution():
    logits = np.log(np.float32([0.5, 0.2, 0.3]))
    rng = np.random.default_rng(1)
    drawn = [pick(logits, sampling({"temperature": 1.0}), rng) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.5, 0.2, 0.3], atol=0.03)
