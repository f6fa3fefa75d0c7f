"""`edgeadapt blend` against peft's add_weighted_adapter on a tiny llama, and what it leaves of a bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel

from edgeadapt.bundle import Bundle, open_bundle
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e.conftest import Exported, Invoke, Tiny, content
from tests.e2e.reference import CLOSE, base_model, case, error, forward
from tests.e2e.tiny import LLAMA, save_adapter

WEIGHTS = {"one": 0.7, "two": -0.4}
RANK = 4


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A bundle of two adapters of the same rank, and their folders."""
    base, folder = tiny("llama").base, tmp_path_factory.mktemp("blend")
    adapters = {}
    for seed, name in enumerate(WEIGHTS):
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=8, target_modules=LLAMA)
        adapters[name] = save_adapter(base_model("llama", base), config, folder / name)
    recipe = Recipe(tuple(adapters.values()), str(base), folder / "two.bundle", quantize="none")
    return export_bundle(recipe).path, adapters


@pytest.fixture
def bundle(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "two.bundle"))


@pytest.fixture(scope="module")
def tuned(made: tuple[Path, dict[str, Path]], tiny: Callable[[str], Tiny]) -> PeftModel:
    one, two = made[1].values()
    model = PeftModel.from_pretrained(base_model("llama", tiny("llama").base), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    return model


def changes(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    """Return what an adapter of LoRA adds to each module's weight."""
    tensors = bundle.adapter_tensors(name)
    slots = [slot for slot in bundle.manifest.slots if slot.inputs["a"] in tensors]
    return {slot.site: (tensors[slot.inputs["a"]] @ tensors[slot.inputs["b"]]).T for slot in slots}


@pytest.mark.parametrize(
    ("method", "theirs", "flags", "options"),
    [
        ("cat", "cat", [], {}),
        ("linear", "linear", [], {}),
        ("svd", "svd", ["--rank", 3], {"svd_rank": 3}),
        ("task_arithmetic", "cat", [], {}),
        ("ties", "ties_svd", ["--density", 0.3, "--rank", 6], {"density": 0.3, "svd_rank": 6}),
        ("magnitude_prune", "magnitude_prune_svd", [], {"density": 0.5}),
        # without chance, the rest of the formula
        ("dare_ties", "dare_ties_svd", ["--density", 1], {"density": 1.0}),
        ("dare_linear", "dare_linear_svd", ["--density", 1], {"density": 1.0}),
    ],
)
def test_peft_makes_the_same(
    method: str, theirs: Any, flags: list[Any], options: Any, invoke: Invoke, bundle: Path, tuned: PeftModel
) -> None:
    pairs = [f"{name}={weight}" for name, weight in WEIGHTS.items()]
    shown = invoke("blend", bundle, *pairs, "--as", "new", "--method", method, *flags, "--json")
    blend = json.loads(shown.stdout)["adapters"]["new"]["blend"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a density of 1
        tuned.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "blend", combination_type=theirs, **options)
    tuned.set_adapter("blend")
    inputs = case("llama")
    logits = forward(tuned, inputs)
    expected = {
        name.removeprefix("base_model.model."): module.get_delta_weight("blend").detach().numpy()
        for name, module in tuned.named_modules()
        if "blend" in getattr(module, "lora_A", ())
    }
    tuned.set_adapter("one")
    tuned.delete_adapter("blend")

    opened = open_bundle(bundle)
    found = changes(opened, "new")
    assert found.keys() == expected.keys()
    for site, change in expected.items():
        assert np.linalg.norm(found[site] - change) <= CLOSE * np.linalg.norm(change), site
    with open_session(opened) as session:
        session.use("new")
        assert error(logits, session.run(inputs)["logits"], inputs) < CLOSE
    assert invoke("verify", bundle).exit_code == 0

    one, two = changes(opened, "one"), changes(opened, "two")
    exact = {site: WEIGHTS["one"] * one[site] + WEIGHTS["two"] * two[site] for site in one}
    apart = np.sqrt(sum(np.sum((found[site] - exact[site]) ** 2) for site in exact))
    apart /= np.sqrt(sum(np.sum(change**2) for change in exact.values()))
    assert blend["error"] == pytest.approx(apart, rel=1e-3, abs=1e-6)
    assert (blend["error"] < 1e-6) == (method in {"cat", "task_arithmetic"})
    assert (blend["method"], [(part["adapter"], part["weight"]) for part in blend["parts"]]) == (
        method,
        list(WEIGHTS.items()),
    )


def test_the_same_command_gives_the_same_bytes(invoke: Invoke, bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other.bundle"))
    command = ("one=0.5", "two=0.5", "--as", "new", "--method", "dare_ties", "--seed")
    for path in (bundle, other):
        assert invoke("blend", path, *command, 3, "--quiet").exit_code == 0
    assert content(bundle) == content(other)
    assert open_bundle(bundle).adapter_record("new").blend.seed == 3
    before = content(other / "adapters" / "new")
    taken = invoke("blend", other, *command, 4)
    assert taken.exit_code == 1
    assert taken.stderr.endswith(
        f"error: {other} already has an adapter 'new'\nhint: choose another name with --as, or pass --force\n"
    )
    assert content(other / "adapters" / "new") == before
    assert invoke("blend", other, *command, 4, "--force", "--quiet").exit_code == 0
    assert content(other / "adapters" / "new") != before


def test_without_torch(bundle: Path) -> None:
    code = (
        "import sys\nfrom edgeadapt.blending import blend_adapters\n"
        "blend_adapters(sys.argv[1], {'one': 1, 'two': 0.5}, name='new', method='ties')\n"
        "assert not {'torch', 'transformers', 'peft', 'onnx'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle)], check=True, timeout=120)
    assert open_bundle(bundle).adapter_names == ("new", "one", "two")


def test_heads_are_summed_too_and_int8_is_stored(invoke: Invoke, copied: Exported) -> None:
    """Adapters with classifiers of their own, whose factors are stored as int8 codes."""
    bundle = copied("bert", quantize="none", adapter_dtype="int8")
    inputs = case("bert")
    result = invoke("blend", bundle, "adapter0=0.75", "adapter1=0.25", "--as", "both", "--json")
    found = json.loads(result.stdout)["adapters"]["both"]
    assert (found["kind"], found["blend"]["error"] < 1e-6) == ("lora", True)
    with open_session(bundle) as session:
        session.use({"adapter0": 0.75, "adapter1": 0.25})
        expected = session.run(inputs)["logits"]
        session.use("both")
        # the head's mean is rounded to codes again
        assert error(expected, session.run(inputs)["logits"], inputs) < 0.02
    before = content(bundle)
    refused = invoke("blend", bundle, "adapter0=0.5", "adapter1=0.25", "--as", "less")
    assert refused.exit_code == 1
    assert refused.stderr.endswith(
        "error: 'classifier.bias' is replaced with weights that do not add up to 1, and the base's own value is not at "
        "hand\nhint: choose weights that add up to 1\n"
    )
    unknown = invoke("blend", bundle, "adapter0=0.5", "oops=0.5", "--as", "less")
    assert unknown.stderr.endswith(
        f"error: {bundle} has no adapter 'oops'\nhint: adapters of this bundle: adapter0, adapter1, both\n"
    )
    named = invoke("blend", bundle, "adapter0=1", "--as", "base")
    assert named.stderr.endswith(
        "error: adapter name 'base' stands for the bare base\nhint: choose another name with --as\n"
    )
    assert content(bundle) == before
