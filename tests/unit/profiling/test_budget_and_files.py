"""Budgets, profiles as files, and the published schema."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edgeadapt.errors import FileError, ProfileError
from edgeadapt.profiling import profile
from edgeadapt.profiling.budget import broken
from edgeadapt.profiling.catalogue import FIGURES, figure_name
from edgeadapt.profiling.figures import Profile, Quality
from edgeadapt.profiling.stored import json_schema, read_profile, write_profile

SMALL = {"threads": 1, "prompt_tokens": 8, "new_tokens": 5, "repeats": 2, "attempts": 1}
PUBLISHED = Path(__file__).parents[3] / "docs" / "formats" / "profile-2.schema.json"


@pytest.fixture(scope="module")
def found(decoder) -> Profile:
    return profile(decoder, adapter="b", operators=True, **SMALL)


def test_every_named_figure_can_be_read_and_its_samples_give_it(found):
    values = {name: figure.read(found) for name, figure in FIGURES.items()}
    assert values["peak_resident_bytes"] == found.memory.peak_resident_bytes
    assert values["total_bytes"] == found.sizes.total_bytes
    assert values["relative_error"] == max(check.relative_error for check in found.checks)
    assert values["adapter_tax_idle_ratio"] == found.adapter_tax.idle_ratio
    sampled = {name for name, figure in FIGURES.items() if figure.samples and figure.samples(found)}
    assert {"ttft_s", "decode_tokens_per_s", "prefill_tokens_per_s", "latency_p99_s", "swap_blend_s"} <= sampled
    for name in sampled:
        taken = np.asarray(FIGURES[name].samples(found), np.float64)
        given = FIGURES[name].statistic(np.stack([taken, taken / 2]))
        assert given == pytest.approx([values[name], values[name] / 2]), name


def test_most_and_least(found):
    fixed = dataclasses.replace(found, latency_p95_s=0.06, decode_tokens_per_s=20.0, cold_load_time_s=None)
    assert broken(fixed, {"latency_p95_s": 0.06, "decode_tokens_per_s": 20.0}) == ()
    told = [
        str(each)
        for each in broken(fixed, {"latency_p95_s": 0.05, "decode_tokens_per_s": 30.0, "cold_load_time_s": 1.0})
    ]
    assert told == [
        "latency_p95_s is 60 ms (0.06), the budget is at most 50 ms (0.05)",
        "decode_tokens_per_s is 20 /s (20), the budget is at least 30 /s (30)",
        "cold_load_time_s was not measured, the budget is at most 1.00 s (1)",
    ]


def test_words_of_a_figure_may_stand_in_any_order(found):
    assert {figure_name("_".join(reversed(name.split("_")))) for name in FIGURES} == set(FIGURES)
    fixed = dataclasses.replace(found, latency_p95_s=0.06)
    assert [each.figure for each in broken(fixed, {"p95_latency_s": 0.05})] == ["latency_p95_s"]
    with pytest.raises(ProfileError, match="there are two budgets of latency_p95_s"):
        broken(fixed, {"p95_latency_s": 0.05, "latency_p95_s": 0.07})


def test_unknown_figures_and_limits_are_refused(found):
    with pytest.raises(
        ProfileError,
        match=r"no figure 'p96_latency_s'\nHint: did you mean 'latency_p9.*'\? known figures: process_start_s",
    ):
        broken(found, {"p96_latency_s": 1.0})
    with pytest.raises(ProfileError, match="the budget of ttft_s is nan"):
        broken(found, {"ttft_s": float("nan")})


def test_quality_is_that_of_the_active_adapter(found):
    from edgeadapt.profiling.assemble import quality_of

    assert found.quality is None  # the tiny bundle's manifest says none

    class Told:
        manifest = dataclasses.make_dataclass("M", ["merged", "quality"])(
            "m",
            (
                {"adapter": None, "mean_kl": 0.1, "top1": 0.9},
                {"adapter": "b", "mean_kl": 0.2, "top1": None},
                {"adapter": "b", "mean_kl": 0.3, "top1": 0.8},
            ),
        )

    assert quality_of(Told, None) == Quality(0.1, 0.9)
    assert quality_of(Told, "b") == Quality(0.3, 0.8)
    assert quality_of(Told, "c") is None
    assert quality_of(Told, "m") == Quality(0.1, 0.9)  # merged into the base


def test_there_and_back(found, tmp_path):
    path = tmp_path / "a profile.json"
    write_profile(path, found)
    assert read_profile(path) == found
    assert [each.name for each in tmp_path.iterdir()] == ["a profile.json"]


def test_files_that_are_no_profile(found, tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(FileError, match="cannot read"):
        read_profile(path)
    path.write_text("[]")
    with pytest.raises(ProfileError, match="it is no profile: its schema is None"):
        read_profile(path)
    path.write_text(json.dumps({**found.to_json(), "schema": "edgeadapt.profile/1"}))
    with pytest.raises(ProfileError, match=r"its schema is 'edgeadapt\.profile/1', not 'edgeadapt\.profile/2'"):
        read_profile(path)
    path.write_text(json.dumps({**found.to_json(), "extra": 1}))
    with pytest.raises(ProfileError, match="unknown field extra"):
        read_profile(path)


def test_the_published_schema_is_fresh():
    # python -c 'from edgeadapt.profiling.stored import *; print(json.dumps(json_schema(), indent=2))'
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == json_schema()


def test_a_real_profile_fits_the_schema_and_a_spoilt_one_does_not(found):
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json_schema())
    plain = json.loads(json.dumps(found.to_json()))
    assert list(check.iter_errors(plain)) == []
    for spoilt in ({**plain, "extra": 1}, {**plain, "threads": "1"}, {**plain, "schema": "x"}):
        assert list(check.iter_errors(spoilt))
