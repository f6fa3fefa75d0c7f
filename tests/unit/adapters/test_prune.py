"""Which ranks of an adapter go first, and what is left of it."""

from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate
from edgeadapt.adapters.prune import SITE_COST, Sensitivity, expected_kl, pruned, spectrum

RANK = 4


def _matrix(generator, *shape):
    return generator.normal(size=shape).astype(np.float32)


def _update(kind="linear", seed=0):
    generator = np.random.default_rng(seed)
    if kind == "conv2d":
        return SiteUpdate(a=_matrix(generator, RANK, 3, 2, 2), b=_matrix(generator, 5, RANK, 1, 1))
    return SiteUpdate(a=_matrix(generator, 6, RANK), b=_matrix(generator, RANK, 5))


def _sensitivity(seed=1):
    generator = np.random.default_rng(seed)
    h, g = generator.normal(size=(50, RANK)), generator.normal(size=(50, RANK))
    return Sensitivity(h.T @ h / 50, g.T @ g / 50)


def _change(update):
    """Return A B as float32[out, inputs of one position]."""
    if update.b.ndim == 4:
        return update.b[:, :, 0, 0] @ update.a.reshape(len(update.a), -1)
    return (update.a @ update.b).T


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_turning_the_ranks_changes_nothing(kind):
    update = _update(kind)
    item = spectrum(update, _sensitivity())
    assert item.a.shape == update.a.shape
    assert item.b.shape == update.b.shape
    assert (np.diff(item.kl) <= 0).all()
    np.testing.assert_allclose(_change(SiteUpdate(a=item.a, b=item.b)), _change(update), rtol=1e-4, atol=1e-5)


def test_the_cost_of_all_ranks_is_half_the_expected_square_of_gradient_times_change():
    sensitivity = _sensitivity()
    item = spectrum(_update(), sensitivity)
    exact = np.trace(sensitivity.gradients @ sensitivity.moments) / 2
    # 1 % of both moments is taken from the factors themselves
    assert item.kl.sum() == pytest.approx(exact, rel=0.08)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_ranks_that_do_nothing_go_first_and_cost_nothing(kind):
    update = _update(kind)
    index = (slice(None), slice(2, None)) if kind == "conv2d" else slice(2, None)
    update.b[index] = 0.0  # two of four ranks lead nowhere
    gradients = np.diag([1.0, 1.0, 0.0, 0.0])
    item = spectrum(update, Sensitivity(np.eye(RANK), gradients))
    assert item.kl[2:].max() < 1e-9 * item.kl[0]
    adapter = pruned(ResolvedAdapter("a", "lora", {"m": update}, {}), {"m": item}, item.kl[1] / (100 * SITE_COST))
    assert adapter.sites["m"].rank == 2
    np.testing.assert_allclose(_change(adapter.sites["m"]), _change(update), rtol=1e-4, atol=1e-5)


def test_what_few_inputs_use_is_cheap_however_large_its_weights():
    update = _update()
    update.a[:, 0] *= 100
    moments = np.diag([1e-6, 1.0, 1.0, 1.0])  # a direction that inputs hardly have
    item = spectrum(update, Sensitivity(moments, np.eye(RANK)))
    by_weights = spectrum(update, Sensitivity(update.a.T.astype(float) @ update.a, np.eye(RANK)))
    assert item.kl[0] < 10 * item.kl[1]
    assert by_weights.kl[0] > 100 * by_weights.kl[1]


def test_samples_that_never_reach_a_site_leave_its_cost_at_nothing():
    zero = np.zeros((RANK, RANK))
    item = spectrum(_update(), Sensitivity(zero, zero))
    assert item.kl.sum() == 0
    assert np.isfinite(item.a).all()
    assert np.isfinite(item.b).all()


def test_price_decides_ranks_then_sites_and_gains_stay():
    strong, weak = _update(seed=2), _update(seed=3)
    gain = np.full(5, 2.0, np.float32)
    sites = {
        "strong": strong,
        "weak": weak,
        "scaled": SiteUpdate(a=weak.a, b=weak.b, gain=gain),
        "only": SiteUpdate(gain=gain),
        "fed": SiteUpdate(a=weak.a, b=weak.b, input_gain=np.full(6, 2.0, np.float32)),
    }
    adapter = ResolvedAdapter("a", "lora", sites, {"head": np.ones(3, np.float32)})
    important = Sensitivity(np.diag([1000.0, 400.0, 200.0, 1.0]), np.eye(RANK))
    negligible = Sensitivity(np.eye(RANK) * 1e-3, np.eye(RANK))
    spectra = {
        "strong": spectrum(strong, important), "weak": spectrum(weak, negligible), "scaled": spectrum(weak, negligible),
        "fed": spectrum(weak, negligible),
    }  # fmt: skip
    kl = spectra["strong"].kl
    assert pruned(adapter, spectra, 0.0).sites == sites
    price = kl[3] * 1.01
    assert spectra["weak"].kl.sum() < price * SITE_COST < kl[:3].sum()
    assert pruned(adapter, spectra, price).sites["strong"].rank == 3
    some = pruned(adapter, spectra, price)
    assert some.sites.keys() == {"strong", "scaled", "only", "fed"}
    assert list(some.sites["fed"].terms) == ["input_gain"]
    assert some.sites["scaled"].a is None
    assert some.sites["scaled"].gain is gain
    assert some.replaced is adapter.replaced
    none = pruned(adapter, spectra, 1e9)
    assert none.sites.keys() == {"scaled", "only", "fed"}
    lost = sum(item.kl.sum() for item in spectra.values())
    assert expected_kl(spectra, 1e9) == pytest.approx(lost)
    assert expected_kl(spectra, 0.0) == 0.0


def test_the_first_ranks_are_the_best_of_their_number():
    """Leaving out the last of the sorted ranks costs less than leaving out any one of the given ones."""
    update, sensitivity = _update(), _sensitivity()
    item = spectrum(update, sensitivity)
    alone = [sensitivity.gradients[i, i] * sensitivity.moments[i, i] / 2 for i in range(RANK)]
    assert item.kl[-1] < min(alone)
