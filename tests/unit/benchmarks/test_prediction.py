"""The fit behind `edgeadapt predict`: known costs are found again, and what ships is what the points say."""

from __future__ import annotations

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


def test_no_machine_is_faster_than_its_rates(script):
    points = _points(script, np.random.default_rng(3), COSTS)
    rates = {"operator": 1e-6, "bandwidth": 80e9, "int8": 1000e9, "float32": 145e9}
    shares = script._shares(points, rates)
    assert shares["float32"] == 1.0, "they ran at 150 G/s, more than its rate"
    assert shares["operator"] == pytest.approx(4, rel=0.25)
    assert shares["bandwidth"] == pytest.approx(0.5, rel=0.25)
    assert shares["int8"] == pytest.approx(0.5, rel=0.25)


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
    errors = script.left_out(points)
    for kind in ("decode", "prefill"):
        largest = max(abs(error) for point, error in errors if point.kind == kind)
        assert shipped["errors"][kind] == pytest.approx(largest)
    memory, _ = script.fit_memory(rows)
    assert {key: shipped["memory"][key] for key in memory} == pytest.approx(memory)
    assert shipped["shares"] == json.loads(script.MEASURED.read_text(encoding="utf-8"))["shares"]
    assert "| Llama-3.2-1B int4 plain, a token |" in script.PAGE.read_text(encoding="utf-8")
