"""The commands `profile`, `report` and `compare`: exit codes, files, and what goes where."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from edgeadapt.cli.app import app
from edgeadapt.profiling.stored import read_profile

FAST = ["--device", "cpu", "--threads", "1", "--prompt-tokens", "8", "--new-tokens", "5", "--repeats", "1"]


def _run(*args):
    return CliRunner().invoke(app, [str(each) for each in args])


@pytest.fixture(scope="module")
def written(decoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "p.json"
    page = path.with_name("p.html")
    kept = ["--budget", "latency_p95_s=60", "--budget", "decode_tokens_per_s=0.001"]
    done = _run("profile", decoder, *FAST, "--operators", "-o", path, "--html", page, *kept, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(path.read_text())
    assert page.read_text().startswith("<!doctype html>")
    return path


def test_a_budget_that_is_not_kept_exits_with_1_and_names_the_figure(decoder, tmp_path):
    path = tmp_path / "p.json"
    done = _run("profile", decoder, *FAST, "--budget", "bytes_total=1000", "--budget", "runs_per_s=1", "-o", path, "-q")
    assert done.exit_code == 1
    size = read_profile(path).sizes.total_bytes  # the profile is kept all the same
    assert f"error: total_bytes is {size / 1e6:.1f} MB ({size}), the budget is at most 1.0 kB (1000)" in done.stderr
    assert "error: runs_per_s was not measured, the budget is at least 1 /s (1)" in done.stderr


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "latency_p95=1",
            "a profile has no figure 'latency_p95'; did you mean 'latency_p95_s'? known figures: process_start_s,",
        ),
        ("latency_p95_s", "'latency_p95_s' is not of the form FIGURE=LIMIT"),
        ("latency_p95_s=fast", "'fast', the limit of 'latency_p95_s', is not a number"),
        ("latency_p95_s=inf", "the budget of latency_p95_s is inf"),
        ("latency_p95_s=-1", "the budget of latency_p95_s is -1"),
    ],
)
def test_wrong_budgets_are_wrong_usage(decoder, budget, message):
    done = _run("profile", decoder, *FAST, "--budget", budget)
    assert done.exit_code == 2
    assert message in re.sub(r"\s+", " ", done.stderr)


@pytest.mark.parametrize("option", ["-o", "--html"])
@pytest.mark.parametrize(
    ("place", "message"),
    [("missing/p", "cannot write {}: No such file or directory"), (".", "{} is a folder")],
)
def test_where_nothing_can_be_written_nothing_is_measured(decoder, tmp_path, monkeypatch, option, place, message):
    def never(*_args, **_options):
        raise AssertionError

    monkeypatch.setattr("edgeadapt.profiling.profile", never)
    done = _run("profile", decoder, *FAST, option, tmp_path / place)
    assert done.exit_code == 1
    assert f"error: {message.format(tmp_path / place)}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_report_writes_what_is_asked_for(written, tmp_path):
    files = {name: tmp_path / f"r.{name}" for name in ("html", "markdown", "csv", "trace")}
    done = _run("report", written, written, *(part for name, path in files.items() for part in (f"--{name}", path)))
    assert (done.exit_code, done.stdout) == (0, "")
    assert "a decoder.bundle · base #2" in re.sub(r"\s+", " ", files["csv"].read_text())
    assert all(path.stat().st_size > 100 for path in files.values())
    quiet = _run("report", written, "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    missing = _run("report", tmp_path / "none.json")
    assert missing.exit_code == 1
    assert "error: cannot read" in missing.stderr


def test_compare_takes_profiles(written, tmp_path):
    done = _run("compare", written, written, "--json")
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["schema"] == "edgeadapt.comparison/1"
    assert {row["ratio"] for row in made["ratios"]} <= {1.0, None}
    shown = _run("compare", written, written)
    assert "A: a decoder.bundle (first), B: a decoder.bundle (second); from written profiles" in shown.stderr
    assert "warning: not measured in turns" in shown.stderr
    for args in (["compare", written, tmp_path], ["compare", written, written, "--rounds", "6"]):
        wrong = _run(*args)
        assert wrong.exit_code == 2
        assert "only goes with bundles" in wrong.stderr or "two bundles or two profiles" in wrong.stderr
