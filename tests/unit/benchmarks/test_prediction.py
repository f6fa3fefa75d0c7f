"""The fit behind `edgeadapt predict`: known costs are found again, and what ships is what the points say."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from edgeadapt.profiling.work import Work

COSTS = np.array([4e-6, 1 / 40e9, 1 / 500e9, 1 / 150e9])


@pytest.fixture
def script():
    import calibrate_prediction

    return calibrate_prediction


@pytest.fixture
def rows(script):
    return json.loads(script.SHAPES.read_text(encoding="utf-8"))["rows"]


def _points(script, rng, costs):
    points = []
    for number in range(24):
        work = Work(*(rng.uniform(low, high) for low, high in ((100, 900), (1e8, 2e9), (1e8, 1e12), (1e6, 1e10))))
        seconds = float(np.dot(costs, [work.nodes, work.bytes, work.int8, work.float32]))
        points.append(script.Point(f"p{number}", f"g{number % 3}", "decode", seconds, work))
    return points


def test_known_costs_are_found_again(script):
    points = _points(script, np.random.default_rng(0), COSTS)
    np.testing.assert_allclose(script.fit(points), COSTS, rtol=1e-6)
    errors = script.left_out(points)
    assert {point.name for point, _ in errors} == {point.name for point in points}
    assert max(abs(error) for _, error in errors) < 1e-6


def test_a_cost_is_never_negative(script):
    points = _points(script, np.random.default_rng(1), np.array([-1e-7, 1 / 40e9, 1 / 500e9, 0]))
    costs = script.fit(points)
    assert (costs >= 0).all()
    assert costs[0] == 0


RATES = {"1": {"operator": 1e-6, "bandwidth": 80e9, "int8": 1000e9, "float32": 145e9}}
RATES["2"] = {**RATES["1"], "bandwidth": 120e9, "int8": 2000e9}


def _measured(script, rng):
    """Points with one and with two threads, each at its own rates."""
    points = []
    for threads, costs in ((1, COSTS), (2, COSTS * [1, 80 / 120, 0.5, 1])):
        found = _points(script, rng, costs)
        points += [dataclasses.replace(point, threads=threads, runtime="session") for point in found]
    return points


def test_no_machine_is_faster_than_its_rates(script):
    shares = script.shares_of(_measured(script, np.random.default_rng(3)), RATES)
    assert shares["float32"] == 1.0, "they ran at 150 G/s, more than its rate"
    assert shares["operator"] == pytest.approx(4, rel=0.25)
    assert shares["bandwidth"] == pytest.approx(0.5, rel=0.25)
    assert shares["int8"] == pytest.approx(0.5, rel=0.25)


def test_what_is_held_out_is_predicted_from_the_rates_of_its_own_threads(script):
    points = _measured(script, np.random.default_rng(4))
    slow = [dataclasses.replace(each, seconds=each.seconds * (2 if each.threads == 2 else 1)) for each in points]
    errors = script.held_out(slow, {name: {**rates, "float32": 160e9} for name, rates in RATES.items()}, "threads")
    assert [point for point, _ in errors] == slow
    twice = [error for point, error in errors if point.threads == 2]
    assert twice == pytest.approx([-0.5] * len(twice), abs=1e-6)


def test_a_point_that_is_left_out_does_not_help_itself(script):
    points = _points(script, np.random.default_rng(2), COSTS)
    wrong = [
        script.Point(point.name, point.group, "decode", point.seconds * (2 if point.group == "g0" else 1), point.work)
        for point in points
    ]
    errors = {point.name: error for point, error in script.left_out(wrong)}
    assert errors["p0"] == pytest.approx(-0.5, abs=1e-6)


def test_the_points_are_those_that_were_measured(script, rows):
    points = script.shape_points(rows)
    assert len(points) == 3 * sum(len(row["points"]) for row in rows)
    assert {point.kind for point in points} == {"decode", "prefill"}
    row = rows[0]
    token = next(point for point in points if point.name == f"{row['points'][1]['name']}, a token")
    assert token.seconds == row["points"][1]["seconds"]
    assert token.work.nodes == row["points"][1]["nodes"]
    cache = 8 * row["sizes"]["layers"] * row["sizes"]["key_heads"] * row["sizes"]["head_dim"]
    assert token.work.bytes == row["points"][1]["bytes"] + (script.DECODED_AFTER + 1) * cache


def test_what_ships_is_what_the_points_say(script, rows):
    shipped = json.loads(script.CALIBRATION.read_text(encoding="utf-8"))
    points = script.shape_points(rows)
    costs = script.fit(points)
    assert shipped["reference"]["operator_s"] == pytest.approx(costs[0])
    assert shipped["reference"]["bytes_per_s"] == pytest.approx(1 / costs[1])
    memory, _ = script.fit_memory(rows)
    assert {key: shipped["memory"][key] for key in memory} == pytest.approx(memory)
    measured = json.loads(script.MEASURED.read_text(encoding="utf-8"))
    here = [script.Point.read(point) for point in measured["points"]]
    assert shipped["shares"] == pytest.approx(script.shares_of(here, measured["rates"]))
    assert shipped["errors"] == pytest.approx(script.interval(points, here, measured["rates"]))
    largest = max(abs(error) for point, error in script.left_out(points) if point.kind == "decode")
    assert shipped["errors"]["decode"] >= largest
    assert {point.threads for point in here} == {1, 2}
    assert {point.runtime for point in here} == {"session", "onnxruntime"}
    assert "| Llama-3.2-1B int4 plain, a token |" in script.PAGE.read_text(encoding="utf-8")
