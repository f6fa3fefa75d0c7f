"""Comparisons: what follows from which figures; how fast anything is, is nobody's business here."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgeadapt.errors import ProfileError
from edgeadapt.profiling import Profile, profile
from edgeadapt.profiling import compare as comparing
from edgeadapt.profiling.compare import compare_bundles, compare_profiles
from edgeadapt.profiling.samples import percentile

SMALL = {"threads": 1, "prompt_tokens": 8, "new_tokens": 5, "repeats": 2, "attempts": 1}


@pytest.fixture(scope="module")
def found(decoder) -> Profile:
    return profile(decoder, adapter="b", **SMALL)


def _slower(found: Profile, times: float) -> Profile:
    taken = tuple(each * times for each in found.samples["latency_s"])
    return dataclasses.replace(
        found,
        samples={**found.samples, "latency_s": taken},
        latency_p50_s=percentile(taken, 50),
        decode_tokens_per_s=found.decode_tokens_per_s / times,
        noisy=False,
    )


def _with_latencies(found: Profile, taken: list[float]) -> Profile:
    return dataclasses.replace(found, samples={"latency_s": tuple(taken)}, latency_p50_s=percentile(taken, 50))


def test_two_profiles(found):
    made = compare_profiles(found, _slower(found, 100))
    rows = {row.figure: row for row in made.ratios}
    assert (made.rounds, made.a, made.b) == (0, "a decoder.bundle (first)", "a decoder.bundle (second)")
    assert made.notes[0].startswith("not measured in turns")
    assert rows["latency_p50_s"].ratio == pytest.approx(100)
    assert rows["latency_p50_s"].low < 100 < rows["latency_p50_s"].high
    assert rows["latency_p50_s"].better == "a"
    assert rows["decode_tokens_per_s"].ratio == pytest.approx(0.01)
    assert rows["total_bytes"].ratio == 1
    assert (rows["total_bytes"].low, rows["total_bytes"].better) == (None, None)
    assert rows["ttft_s"].low is None  # two samples say too little
    assert "runs_per_s" not in rows


def test_an_interval_holds_the_true_ratio_as_often_as_it_says(found):
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(60):
        one, other = (_with_latencies(found, rng.lognormal(np.log(mean), 0.2, 60).tolist()) for mean in (0.1, 0.13))
        row = next(row for row in compare_profiles(one, other).ratios if row.figure == "latency_p50_s")
        held += row.low <= 1.3 <= row.high
    assert held >= 51  # 57 are expected; fewer than 51 of 60 at 95 % happen once in 500


def test_profiles_of_different_work_are_refused(found, classifier):
    longer = dataclasses.replace(found, workload=dataclasses.replace(found.workload, new_tokens=6))
    with pytest.raises(ProfileError, match="the workloads differ"):
        compare_profiles(found, longer)
    with pytest.raises(ProfileError, match="only one of them writes text"):
        compare_profiles(found, profile(classifier, **SMALL))
    elsewhere = dataclasses.replace(found, device=dataclasses.replace(found.device, name="pi5"), threads=4)
    notes = compare_profiles(found, elsewhere).notes
    assert "the devices differ: cpu and pi5" in notes
    assert "the threads differ: 1 and 4" in notes


def test_bundles_are_measured_in_turns(found, monkeypatch):
    order = []

    class Run:
        def __init__(self, name, times):
            self.name, self.times = name, times

        def __enter__(self):
            return self

        def __exit__(self, *_):
            order.append(f"close {self.name}")

        def measure(self, **_):
            order.append(self.name)
            # the machine slows down all the time: this falls on both
            return dataclasses.replace(_slower(found, self.times * 1.2 ** len(order)), bundle=self.name)

    runs = iter([Run("x", 1), Run("y", 2)])
    monkeypatch.setattr(comparing, "prepared", lambda *_, **__: next(runs))
    made = compare_bundles("x", "y", rounds=6)
    assert order == ["x", "y", "y", "x"] * 3 + ["close y", "close x"]
    row = next(row for row in made.ratios if row.figure == "latency_p50_s")
    assert (made.a, made.b, made.rounds) == ("x · b", "y · b", 6)
    assert row.ratio == pytest.approx((2 * 1.2 + 2 / 1.2) / 2)
    assert (row.low, row.high) == (pytest.approx(2 / 1.2), pytest.approx(2 * 1.2))
    assert row.better == "a"


def test_a_bundle_against_itself(classifier):
    made = compare_bundles(
        classifier, classifier, adapter="a", threads=1, prompt_tokens=8, new_tokens=1, repeats=1, rounds=5
    )
    rows = {row.figure: row for row in made.ratios}
    assert {"load_time_s", "latency_p50_s", "runs_per_s", "peak_resident_bytes", "total_bytes"} <= set(rows)
    assert all(row.low <= row.ratio <= row.high for row in made.ratios if row.low is not None)
    assert (rows["total_bytes"].low, rows["total_bytes"].high) == (1, 1)
    assert rows["latency_p50_s"].low is not None
    assert "ttft_s" not in rows


@pytest.mark.parametrize("rounds", [4, 0, True, 5.0])
def test_too_few_rounds_are_refused(classifier, rounds):
    with pytest.raises(ProfileError, match="rounds is "):
        compare_bundles(classifier, classifier, rounds=rounds)
