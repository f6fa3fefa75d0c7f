"""`edgeadapt tune` on a tiny model: what is tried, kept, refused and left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeadapt.bundle import Bundle, open_bundle
from edgeadapt.device import read_device
from edgeadapt.profiling.runtimes import ort_mobile
from edgeadapt.profiling.stored import read_profile
from edgeadapt.tuning.candidates import recipe_toml
from tests.e2e.conftest import Exported, Invoke, Tiny, content

SMALL = ("--threads", 1, "--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 1, "--rounds", 2)


@pytest.fixture
def recipe(tiny: Callable[[str], Tiny], tmp_path: Path) -> Path:
    from edgeadapt.recipe import Recipe

    made = tiny("llama")
    path = tmp_path / "two.toml"
    path.write_text(recipe_toml(Recipe(made.adapters, str(made.base), Path("two.bundle"), max_kl=9.0), "two"))
    return path


def test_the_pick_its_recipe_and_all_figures_are_kept(
    invoke: Invoke, recipe: Path, tracing_once: Callable[[], Any], tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    tries = ("--try", "quantize=none,int8", "--try", "block_size=32", "--try", "merge=false,true")
    with tracing_once():
        found = invoke("tune", "--device", "cpu", "--recipe", recipe, *tries, *SMALL, "-o", out, "--json")
    assert found.exit_code == 0, found.stderr
    result = json.loads(found.stdout)
    trials = {trial["candidate"]: trial for trial in result["trials"]}
    assert set(trials) == {"none", "none merge", "int8", "int8 merge"}
    assert all(trial["failure"] is None and trial["threads"] == 1 for trial in trials.values())
    assert {"latency_p50_s", "mean_kl", "peak_resident_bytes", "total_bytes"} <= set(trials["int8"]["figures"])
    assert trials["int8"]["figures"]["mean_kl"] > trials["none"]["figures"]["mean_kl"]
    fastest = min(trials.values(), key=lambda trial: trial["figures"]["latency_p50_s"])
    assert result["pick"] == fastest
    assert fastest["pareto"]
    assert "no budget was given, so the pick may answer badly: see its mean KL" in result["notes"]

    assert {path.name for path in out.iterdir()} == {
        "device.toml", "profiles", "recipe.toml", "tuning.json", "two.bundle",
    }  # fmt: skip
    assert json.loads((out / "tuning.json").read_bytes()) == result
    profiles = [read_profile(path) for path in sorted((out / "profiles").iterdir())]
    assert [(each.precision, each.memory is None) for each in profiles] == [
        (p, False) for p in ("none", "int8")
    ] * 0 + [(trial["candidate"].split()[0], False) for trial in result["trials"]]
    device = read_device(out / "device.toml")
    assert (device.threads, device.runtime) == (1, "session")
    again = tmp_path / "again" / "two.bundle"
    assert invoke("export", "--recipe", out / "recipe.toml", "-o", again, "--quiet").exit_code == 0
    assert content(again) == content(out / "two.bundle")


def test_budgets_choose_among_bundles_that_are_there(invoke: Invoke, exported: Exported, tmp_path: Path) -> None:
    exact, small = exported("llama", quantize="none"), exported("llama", quantize="int8")
    command = ("tune", exact, small, "--device", "cpu", *SMALL, "--objective", "total_bytes", "--objective", "mean_kl")
    first = json.loads(invoke(*command, "--json").stdout)
    kl = {trial["candidate"]: trial["figures"]["mean_kl"] for trial in first["trials"]}
    one, other = kl
    assert first["pick"]["candidate"] == other
    assert first["recipe"] is None
    assert [trial["pareto"] for trial in first["trials"]] == [True, True]

    limit = (kl[one] + kl[other]) / 2
    strict = json.loads(invoke(*command, "--budget", f"mean_kl={limit}", "--json").stdout)
    assert strict["pick"]["candidate"] == one
    assert [bool(trial["broken"]) for trial in strict["trials"]] == [False, True]

    out = tmp_path / "none.tuned"
    failed = invoke(*command, "--budget", f"mean_kl={limit}", "--budget", "total_bytes=1000", "-o", out)
    assert failed.exit_code == 1
    assert "error: nothing that was tried keeps the budgets; the nearest is" in failed.stderr
    assert "total_bytes is" in failed.stderr
    assert json.loads((out / "tuning.json").read_bytes())["pick"] is None
    assert not (out / "device.toml").exists()
    assert open_bundle(exact).adapter_names  # what was there is there


def test_a_candidate_that_cannot_be_exported_is_told(
    invoke: Invoke, recipe: Path, tracing_once: Callable[[], Any], tmp_path: Path
) -> None:
    recipe.write_text(recipe.read_text().replace("max_kl = 9.0", "max_kl = 1e-9"))
    out = tmp_path / "tuned"
    tries = ("--try", "quantize=none,int8", "--try", "block_size=32")
    with tracing_once():
        found = invoke("tune", "--device", "cpu", "--recipe", recipe, *tries, *SMALL, "-o", out)
    assert found.exit_code == 0, found.stderr
    result = json.loads((out / "tuning.json").read_bytes())
    failures = {trial["candidate"]: trial["failure"] for trial in result["trials"]}
    assert failures["none"] is None
    assert "KL" in failures["int8"]
    assert f"warning: int8: {failures['int8']}" in found.stderr
    assert result["pick"]["candidate"] == "none"


def test_bad_input_leaves_nothing(
    invoke: Invoke, exported: Exported, recipe: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    bundle, other, out = exported("llama", quantize="int8"), exported("bert", quantize="int8"), tmp_path / "tuned"
    for arguments, message in (
        ((), "there is nothing to tune"),
        ((bundle, "--try", "quantize=int4"), "there is no recipe to export with it"),
        ((bundle, other), "are not of one base"),
        ((bundle, "--adapter", "oops"), "has no adapter 'oops'"),
        ((bundle, "--objective", "speed"), "a profile has no figure 'speed'"),
        ((bundle, "--runtime", "oops"), "oops"),
        (("--recipe", recipe, "--try", "quantize=int3"), "unknown scheme 'int3'"),
        (("--recipe", recipe, "--adapter", "oops"), "the recipe has no adapter 'oops'"),
        ((other, "--recipe", recipe, "--adapter", "adapter0", "--try", "quantize=none"), "are not of one base"),
    ):
        with subtests.test(message=message):
            found = invoke("tune", *arguments, "--device", "cpu", *SMALL, "-o", out)
            assert found.exit_code == 1, found.stderr
            assert message in found.stderr
            assert not list(tmp_path.glob("*tuned*"))


def test_a_bundle_is_converted_once_for_all_threads_and_rounds(
    invoke: Invoke, exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundles, out, made = [exported("bert", quantize=scheme) for scheme in ("int8", "none")], tmp_path / "tuned", []
    own = ort_mobile.prepare

    def counted(bundle: Bundle, *rest: Any) -> Any:
        made.append(bundle.path)
        return own(bundle, *rest)

    monkeypatch.setattr(ort_mobile, "prepare", counted)
    runtimes = ("--runtime", "ort-mobile", "--runtime", "session", "--threads", 2)
    found = invoke("tune", *bundles, "--device", "cpu", *runtimes, *SMALL, "-o", out, "--json")
    assert found.exit_code == 0, found.stderr
    trials = json.loads(found.stdout)["trials"]
    assert [trial["failure"] for trial in trials] == [None] * 8
    assert sorted(made) == sorted(bundles)
    assert {path.name for path in out.iterdir()} == {"device.toml", "profiles", "tuning.json"}
