from __future__ import annotations

import json

import numpy as np
import pytest

from edgeadapt.errors import ExportError
from edgeadapt.quality.parity import measure_parity

MODES = ["prefill", "chunks of 3", "chunks of 5", "token by token"]


def _references(session, cases, adapters=(None, "a", "b")):
    return {adapter: [session.answers(adapter, case) for case in cases] for adapter in adapters}


FEWER = ["prefill", "chunks of 5", "prefill, batch"]


def test_both_graphs_run_in_every_mode_and_every_adapter_in_some(session, cases):
    session.faults = {"chunks of 5": 1e-5}
    result = measure_parity(session, cases, _references(session, cases), tolerance=1e-4)
    assert json.loads(json.dumps(result)) == result
    assert [(row["adapter"], row["mode"]) for row in result["rows"]] == [
        *((adapter, mode + several) for adapter in (None, "a") for several in ("", ", batch") for mode in MODES),
        *(("b", mode) for mode in FEWER),
    ]
    worst = {row["mode"]: row["max_relative_error"] for row in result["rows"]}
    assert 0 < worst["chunks of 5"] < 1e-4
    assert worst["prefill"] == 0
    assert result["max_relative_error"] == max(row["max_relative_error"] for row in result["rows"])
    assert session.adapter is None


def test_other_models_are_just_run(session, cases):
    session.spec = None
    result = measure_parity(session, cases, _references(session, cases, (None,)))
    assert [row["mode"] for row in result["rows"]] == ["run", "run, batch"]


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("a", "adapter 'a' differs from torch by {} of its largest value in mode 'prefill'"),
        ("None", "the base differs from torch by {} of its largest value in mode 'prefill'"),
        ("chunks of 1", "the base differs from torch by {} of its largest value in mode 'token by token'"),
    ],
)
def test_an_error_above_the_tolerance_is_told(session, cases, fault, where):
    session.faults = {fault: 0.25}
    references = _references(session, cases)
    largest = np.abs(references["a" if fault == "a" else None][0]["logits"]).max()
    with pytest.raises(ExportError) as caught:
        measure_parity(session, cases, references)
    assert str(caught.value) == (
        f"output 'logits' of {where.format(f'{0.25 / largest:.2g}')} (allowed: 0.0001)\n"
        "Hint: this is a wrong export, not rounding; please report the model's class and this message"
    )


def test_nan_is_an_error(session, cases):
    session.faults = {"b": float("nan")}
    with pytest.raises(ExportError, match="adapter 'b' differs from torch by inf of"):
        measure_parity(session, cases, _references(session, cases))


def test_a_swap_that_leaves_something_behind_is_told(session, cases):
    session.faults = {"swap": 1e-6}
    with pytest.raises(ExportError) as caught:
        measure_parity(session, cases, _references(session, cases, (None, "a")))
    assert str(caught.value) == (
        "output 'logits' of the base is not the same after other adapters were active\n"
        "Hint: this is a bug in the session; please report it"
    )


def test_nothing_to_compare_is_an_error(session):
    with pytest.raises(ExportError, match="there is nothing to compare with"):
        measure_parity(session, [], {None: []})
