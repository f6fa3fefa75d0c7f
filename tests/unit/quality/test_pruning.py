"""How much of an adapter may go: searched and measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate
from edgeadapt.adapters.prune import Sensitivity
from edgeadapt.errors import QuantizeError
from edgeadapt.quality import pruning
from edgeadapt.quality.compare import kl_divergence
from edgeadapt.quality.pruning import prune

INPUTS, RANK, CLASSES, SITES = 12, 6, 9, 4


class Linear:
    """A session whose model is the sum of `SITES` linear sites; it counts its runs."""

    def __init__(self, base: list[Any], output: str = "logits") -> None:
        self.base, self.output, self.runs, self.known, self.active = base, output, 0, {}, None

    def lend(self, name: str, adapter: ResolvedAdapter) -> None:
        self.known[name] = adapter

    def evict(self, name: str) -> None:
        del self.known[name]

    def use(self, name: str | None) -> None:
        self.active = None if name is None else self.known[name]

    def run(self, case: Any) -> dict[str, Any]:
        self.runs += 1
        y = sum(case["x"] @ weight for weight in self.base)
        for update in () if self.active is None else self.active.sites.values():
            y = y + case["x"] @ update.a @ update.b
        return {self.output: y.astype(np.float32)}


@pytest.fixture
def setting(monkeypatch):
    """(session, adapter, sensitivities, cases): sites whose ranks matter less and less."""
    monkeypatch.setattr(pruning.bundles, "bind", lambda adapter, _manifest: adapter)
    generator = np.random.default_rng(0)
    session: Any = Linear([generator.normal(size=(INPUTS, CLASSES)) * 0.3 for _ in range(SITES)])
    session.bundle = dataclasses.make_dataclass("Bundle", ["manifest"])(None)
    sizes = 0.5 ** np.arange(RANK)
    sites = {
        f"m{i}": SiteUpdate(
            a=(generator.normal(size=(INPUTS, RANK)) * sizes / (1 + i)).astype(np.float32),
            b=generator.normal(size=(RANK, CLASSES)).astype(np.float32),
        )
        for i in range(SITES)
    }
    cases = [{"x": generator.normal(size=(4, INPUTS))} for _ in range(8)]
    adapter = ResolvedAdapter("mine", "lora", sites, {})
    x = np.concatenate([case["x"] for case in cases])
    sensitivities = {}
    for path, update in sites.items():
        h = x @ update.a
        g = generator.normal(size=(200, CLASSES)) @ update.b.T * 0.3
        sensitivities[path] = Sensitivity(h.T @ h / len(h), g.T @ g / 200)
    return session, adapter, sensitivities, cases


def _kl(session, whole, cut, cases):
    outputs = []
    for adapter in (whole, cut):
        session.active = adapter
        outputs.append(np.concatenate([session.run(case)["logits"] for case in cases]))
    return kl_divergence(*outputs).mean()


@pytest.mark.parametrize("budget", [1e-4, 1e-3, 1e-2, 1e-1])
def test_the_budget_is_kept_and_nearly_used(setting, budget):
    session, adapter, sensitivities, cases = setting
    cut, record = prune(session, adapter, sensitivities, cases, budget)
    assert session.runs <= (pruning._TRIES + 1) * len(cases)
    assert session.known == {}
    assert session.active is None
    assert record.max_kl == budget
    assert record.kl <= budget
    assert record.kl == pytest.approx(_kl(session, adapter, cut, cases), rel=1e-9)
    assert (record.ranks_before, record.sites_before) == (RANK * SITES, SITES)
    assert record.parameters_before == adapter.parameter_count
    assert record.parameters == cut.parameter_count
    assert (record.ranks, record.sites) == (sum(u.rank for u in cut.sites.values()), len(cut.sites))


def test_larger_budgets_leave_less_and_equal_ones_the_same(setting):
    session, adapter, sensitivities, cases = setting
    found = [prune(session, adapter, sensitivities, cases, budget) for budget in (1e-3, 1e-2, 1e-1, 1e-1)]
    left = [record.parameters for _, record in found]
    assert left[0] > left[1] > left[2]
    assert left[2] == left[3]
    for path, update in found[2][0].sites.items():
        np.testing.assert_array_equal(update.a, found[3][0].sites[path].a)


def test_a_budget_too_small_for_anything_leaves_the_adapter_as_it_is(setting):
    session, adapter, sensitivities, cases = setting
    cut, record = prune(session, adapter, sensitivities, cases, 1e-13)
    assert cut is adapter
    assert (record.kl, record.ranks, record.sites) == (0.0, RANK * SITES, SITES)


def test_wrong_expectations_cost_tries_not_the_budget(setting):
    session, adapter, sensitivities, cases = setting
    for factor in (1e-4, 1e4):
        wrong = {path: Sensitivity(item.moments, item.gradients * factor) for path, item in sensitivities.items()}
        cut, record = prune(session, adapter, wrong, cases, 1e-2)
        assert record.kl <= 1e-2
        assert record.ranks < RANK * SITES
        assert cut.parameter_count < adapter.parameter_count


def test_a_model_without_logits_is_refused(setting):
    session, adapter, sensitivities, cases = setting
    session.output = "last_hidden_state"
    with pytest.raises(QuantizeError) as caught:
        prune(session, adapter, sensitivities, cases, 1e-2)
    assert caught.value.message == (
        "prune_kl compares distributions, and this model gives no logits of two or more classes"
    )
    assert caught.value.hint == "leave prune_kl out"


def test_an_adapter_without_low_rank_terms_is_left_alone(setting):
    session, adapter, _, cases = setting
    cut, record = prune(session, adapter, {}, cases, 1e-2)
    assert cut is adapter
    assert record.kl == 0.0
