"""IA3, which scales outputs of some modules and inputs of others: as small as it was trained, in every form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

from edgeadapt.addition import verify_bundle
from edgeadapt.bundle import Bundle
from edgeadapt.errors import BundleError
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e.conftest import Tiny
from tests.e2e.peft_kinds import Case, save
from tests.e2e.reference import case, error, with_peft

GetTiny = Callable[[str], Tiny]
SETTINGS = {
    "usual": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "inside": (["q_proj", "o_proj", "down_proj"], ["q_proj", "down_proj"]),
    "outputs": (["down_proj"], []),
}
"""Adapter to the modules that it scales, and those whose inputs it scales."""


@pytest.fixture(scope="module")
def folders(tiny: GetTiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base, place = tiny("llama").base, tmp_path_factory.mktemp("ia3")
    found = {}
    for seed, (name, (targets, inner)) in enumerate(SETTINGS.items()):
        config = peft.IA3Config(target_modules=targets, feedforward_modules=inner)
        found[name] = save(Case("ia3", lambda config=config: config), base, place / name, seed)
        file = found[name] / "adapter_model.safetensors"
        # None above 1: with a patch a weight stays on the base's scales, where there is nothing beyond its largest.
        gains = {key: 1 - 8 * np.abs(value - 1) for key, value in load_file(file).items()}
        save_file(gains, file, {"format": "pt"})
    return found


@pytest.fixture(scope="module")
def bundle(
    tiny: GetTiny,
    folders: dict[str, Path],
    tracing_once: Callable[[], object],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    model, output = tiny("llama"), tmp_path_factory.mktemp("ia3-bundle") / "out.bundle"
    with tracing_once():  # type: ignore[attr-defined]
        return export_bundle(Recipe(tuple(folders.values()), str(model.base), output, task=model.task, patches=True))


def test_it_is_as_small_as_it_was_trained(bundle: Bundle, folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        trained = load_file(folder / "adapter_model.safetensors")
        assert bundle.manifest.adapters[name].parameters == sum(tensor.size for tensor in trained.values())
        assert bundle.manifest.adapters[name].rank == 0
    scaled = {slot.site.rpartition(".")[2] for slot in bundle.manifest.slots if "input_gain" in slot.inputs}
    assert scaled == {"q_proj", "down_proj"}
    assert {site.rpartition(".")[2] for joined in bundle.manifest.joined for site in joined.sites} == {
        "k_proj",
        "v_proj",
    }
    assert verify_bundle(bundle.path) == []


def test_rows_of_a_batch_have_their_own(bundle: Bundle) -> None:
    inputs = case("llama")
    with open_session(bundle, threads=1) as session:
        rows = session.run(inputs, adapters=["usual", "inside"])["logits"]
        for index, name in enumerate(("usual", "inside")):
            session.use(name)
            one = {key: value[index : index + 1] for key, value in inputs.items()}
            assert error(session.run(one)["logits"], rows[index : index + 1], one) < 1e-6
        assert error(rows[:1], session.run({key: value[:1] for key, value in inputs.items()})["logits"], one) > 1e-2


def test_promoted_it_gives_the_same(
    bundle: Bundle, tiny: GetTiny, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patch is of graphs in which its modules are apart, and of the weights that peft's forward has."""
    monkeypatch.setenv("EDGEADAPT_CACHE_DIR", str(tmp_path / "cache"))
    inputs = case("llama")
    with open_session(bundle, threads=1) as session:
        for name, folder in folders.items():
            expected = with_peft("llama", tiny("llama").base, folder, inputs)
            session.use(None)
            effect = error(expected, session.run(inputs)["logits"], inputs)
            session.use(name)
            swapped = error(expected, session.run(inputs)["logits"], inputs)
            session.promote(name, wait=True)
            promoted = error(expected, session.run(inputs)["logits"], inputs)
            assert session.form == "promoted"
            assert max(swapped, promoted) < 0.25 * effect


def test_what_is_scaled_on_both_sides_is_not_blended(bundle: Bundle) -> None:
    with open_session(bundle, threads=1) as session, pytest.raises(BundleError) as caught:
        session.use({"usual": 0.5, "outputs": 0.5})
    assert caught.value.message == (
        "one adapter of the blend scales the inputs of module 'model.layers.0.mlp.down_proj' (input_gain) and one, the "
        "same or another, its outputs (gain): their weighted sum is neither"
    )
