from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_bundles

from edgeadapt.bundle import Bundle
from edgeadapt.errors import SessionError
from edgeadapt.runtime import open_session, threads


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 1.0, 2: 0.6, 4: 0.59}, 2),
        ({1: 1.0, 2: 0.6, 4: 0.5}, 4),
        ({1: 1.0, 2: 1.5, 4: 3.0}, 1),
        ({1: 1.0, 2: 0.98}, 1),
        ({1: 1.0}, 1),
    ],
)
def test_more_threads_must_be_worth_it(seconds, expected):
    assert threads.fewest_of_the_fastest(seconds) == expected


@pytest.mark.parametrize(("cores", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_numbers_of_threads_that_are_tried(monkeypatch, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert list(threads._candidates()) == expected


@pytest.mark.parametrize("slow", [1, 2])
def test_a_session_takes_the_number_that_is_fastest(decoder, monkeypatch, slow):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    clock = iter(range(10**6))
    weights = {}

    def perf_counter():
        step = weights.setdefault("step", 0)
        return next(clock) * (100 if step == slow else 1)

    measure = threads._median_s

    def measured(open_with, count):
        weights["step"] = count
        return measure(open_with, count)

    monkeypatch.setattr(threads.time, "perf_counter", perf_counter)
    monkeypatch.setattr(threads, "_median_s", measured)
    with open_session(decoder[0], threads="measure") as session:
        assert session.threads == 3 - slow
        session.complete("hello", max_new_tokens=2)


def test_other_models_run_an_adapters_golden_input(classifier, tmp_path, monkeypatch):
    golden = SimpleNamespace(inputs={name: np.ones((1, 4), np.int64) for name in ("input_ids", "attention_mask")})
    monkeypatch.setattr(Bundle, "golden", lambda *_: golden)
    with open_session(classifier[0], threads="measure") as session:
        assert session.threads in threads._candidates()
    tiny_bundles.write_pictures(tmp_path / "p.bundle", zero_shot=False)
    with pytest.raises(SessionError) as caught:
        open_session(tmp_path / "p.bundle", threads="measure")
    assert str(caught.value) == (
        "threads is 'measure', but this bundle has no adapter whose golden input could be run\n"
        "Hint: give a number of threads, or None for one per core"
    )


def test_another_word_is_refused(decoder):
    with pytest.raises(SessionError) as caught, open_session(decoder[0], threads="fast") as session:
        session.prepare()
    assert str(caught.value) == ("threads is 'fast'\nHint: give a whole number of 1 or more, or None for the default")
