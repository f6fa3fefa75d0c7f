"""A key-value cache in int8: measured, swapped, batched, written on, added to; and refused where it cannot be."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from edgeadapt.addition import QUANTIZED_TOLERANCE, add_adapter, verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.bundle.cache_scales import read_cache_scales
from edgeadapt.errors import BundleError, RecipeError
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import Session, open_session
from edgeadapt.runtime.rows import filled_cache
from tests.e2e.conftest import Invoke, Tiny, content
from tests.e2e.reference import CLOSE, error
from tests.e2e.test_patches import quieter
from tests.e2e.tiny import LLAMA, QV, save_adapter
from tests.e2e.virtual import SMALL, logits_of, save_base, save_virtual, with_virtual

MODEL = transformers.LlamaForCausalLM
NAMES = ("a", "b", "prompt", None)
GREEDY: Mapping[str, Any] = {"temperature": 0.0, "ignore_eos": True, "chat": False}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two LoRAs and a prompt on a tiny Llama, nothing quantized but the cache: what differs comes from that."""
    import torch
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("cache")
    base = save_base(MODEL, transformers.LlamaConfig(**SMALL), folder / "base")
    adapters = []
    for name, targets in (("a", LLAMA), ("b", QV)):
        torch.manual_seed(ord(name))
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        adapters.append(save_adapter(MODEL.from_pretrained(base), config, folder / name))
    adapters.append(save_virtual(MODEL, base, "prompt", folder / "prompt"))
    return Recipe(
        tuple(adapters), str(base), folder / "int8.bundle", task="text-generation", quantize="none", kv_cache="int8"
    )


@pytest.fixture(scope="module")
def bundle(recipe: Recipe, tracing_once: Callable[[], Any]) -> Path:
    with tracing_once():
        return export_bundle(recipe).path


@pytest.fixture(scope="module")
def session(bundle: Path) -> Any:
    with open_session(bundle, threads=1, prefix_cache_bytes=0) as session:
        yield session


def _inputs() -> dict[str, np.ndarray]:
    """Return rows of bytes that texts consist of: what the scales were not measured on may be cut off."""
    generator = np.random.default_rng(3)
    mask = np.ones((3, 30), np.int64)
    mask[1, 20:] = mask[2, 4:] = 0
    return {"input_ids": generator.integers(1, 90, (3, 30)), "attention_mask": mask}


def _prompts() -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(1, 90, length).tolist() for length in (17, 4, 9, 3, 1, 6, 25, 2)]


def test_what_is_recorded(bundle: Path, recipe: Recipe, invoke: Invoke) -> None:
    """The unquantized graph is held to torch as ever; KL and top-1 of prefill and decode with the cache are there."""
    manifest = open_bundle(bundle).manifest
    assert manifest.parity["max_relative_error"] < CLOSE
    assert manifest.generation is not None
    assert manifest.generation["cache_dtype"] == "int8"
    rows = [(row["adapter"], row["mode"]) for row in manifest.quality]
    assert rows == [(name, mode) for name in (None, "a", "b", "prompt") for mode in ("prefill", "decode")]
    assert all(0 < row["mean_kl"] < 0.01 and row["top1"] > 0.9 for row in manifest.quality)
    shown = json.loads(invoke("inspect", bundle, "--json").stdout)
    assert shown["kv_cache"] == {"dtype": "int8", "bytes_per_token": 2 * 2 * 2 * 16}
    assert verify_bundle(bundle) == []
    assert {record.tolerance for record in manifest.adapters.values()} == {QUANTIZED_TOLERANCE}


def test_equal_exports_are_equal_and_a_float_one_knows_nothing_of_it(
    bundle: Path, recipe: Recipe, tmp_path: Path, traced_once: None
) -> None:
    again = export_bundle(dataclasses.replace(recipe, output=tmp_path / "int8.bundle")).path
    assert content(again) == content(bundle)
    plain = export_bundle(dataclasses.replace(recipe, output=tmp_path / "float.bundle", kv_cache="float32"))
    assert plain.manifest.generation is not None
    assert plain.manifest.generation.keys().isdisjoint({"cache_dtype", "cache_scales"})
    assert [row["mode"] for row in plain.manifest.quality] == [None] * 4
    with open_session(plain, threads=1) as floats, open_session(bundle, threads=1) as codes:
        assert codes.spec is not None
        scales = read_cache_scales(codes.bundle, codes.spec)
        for name in NAMES:
            floats.use(name)
            codes.use(name)
            held, rounded = (filled_cache(session, _inputs()).read_row(0, 30) for session in (floats, codes))
            for layer, part in ((0, "key"), (0, "value"), (1, "key"), (1, "value")):
                scale = scales[layer, ("key", "value").index(part)]
                found = rounded[f"{layer}.{part}"]
                assert found.dtype == np.int8
                off = np.abs(found - held[f"{layer}.{part}"] / scale)
                assert off.max() <= 0.5001 if layer == 0 else np.median(off) < 3, (name, layer, part)
            expected = floats.run(_inputs())["logits"]
            assert 1e-4 < error(expected, codes.run(_inputs())["logits"], _inputs()) < 0.5


def test_swaps_are_exact(session: Session) -> None:
    found: dict[str | None, bytes] = {}
    for name in (*NAMES, *reversed(NAMES)):
        session.use(name)
        logits = session.run(_inputs(), chunk_size=7)["logits"].tobytes()
        assert found.setdefault(name, logits) == logits
    assert len(set(found.values())) == len(NAMES)


def _written(session: Session, **options: Any) -> list[tuple[int, ...]]:
    texts = []
    for row, prompt in enumerate(_prompts()):
        session.use(NAMES[row % 4])
        texts.append(session.complete(prompt, max_new_tokens=12, **GREEDY, **options).token_ids)
    return texts


def test_greedy_texts_are_the_same_however_they_are_written(bundle: Path, session: Session) -> None:
    """Alone; guessed ahead, with the wrong guesses taken back; in one batch; in rows that begin anew; from a cache."""
    alone = _written(session)
    assert _written(session, lookup=4) == alone
    names = [NAMES[row % 4] for row in range(8)]
    together = session.generate_batch(_prompts(), adapters=names, max_new_tokens=12, **GREEDY)
    assert [text.token_ids for text in together] == alone
    batch = session.batch(rows=3, max_length=40)
    requests = [
        batch.submit(prompt, adapter=name, max_new_tokens=12, **GREEDY)
        for prompt, name in zip(_prompts(), names, strict=True)
    ]
    assert [request.result().token_ids for request in requests] == alone
    with open_session(bundle, threads=1, prefix_cache_bytes=2**20) as remembering:
        assert _written(remembering) == alone
        for row, prompt in enumerate(_prompts()):
            remembering.use(names[row])
            again = remembering.complete(prompt, max_new_tokens=12, **GREEDY)
            assert (again.token_ids, again.cached_tokens) == (alone[row], len(prompt) - 1)
        assert remembering.prefixes is not None
        known = sum(len(prompt) + 11 for prompt in _prompts())
        assert remembering.prefixes.size_bytes == known * 2 * 2 * 2 * 16


def test_a_prefix_is_held_as_codes(bundle: Path, recipe: Recipe, session: Session) -> None:
    model = with_virtual(MODEL, Path(str(recipe.base)), recipe.adapters[2])
    session.use("prompt")
    expected = logits_of(model, "prompt", _inputs())
    assert 1e-4 < error(expected, session.run(_inputs())["logits"], _inputs()) < 0.1


def test_added_later_a_prefix_must_fit_the_scales(bundle: Path, recipe: Recipe, tmp_path: Path) -> None:
    """peft begins prefix tuning with random keys, which are larger than any of a text."""
    copy = Path(shutil.copytree(bundle, tmp_path / "b.bundle"))
    prefix = save_virtual(MODEL, Path(str(recipe.base)), "prefix", tmp_path / "prefix")
    with pytest.raises(BundleError) as caught:
        add_adapter(copy, prefix)
    found = re.fullmatch(
        r"adapter 'prefix': 'prefix\.[01]\.(key|value)' holds (-?[\d.]+), and this bundle's key-value cache in int8 "
        r"holds ([\d.]+) there at most",
        caught.value.message,
    )
    assert found is not None
    assert abs(float(found[2])) > float(found[3])
    assert caught.value.hint == (
        "export the bundle again together with this adapter, so that its range is known, or without --kv-cache int8"
    )
    assert content(copy) == content(bundle)


def test_an_added_prefix_that_fits_is_the_exported_one(bundle: Path, recipe: Recipe, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b.bundle"))
    add_adapter(copy, recipe.adapters[2], name="again", base=recipe.base)
    assert verify_bundle(copy) == []
    with open_session(copy, threads=1) as session:
        session.use("prompt")
        first = session.run(_inputs())["logits"].tobytes()
        session.use("again")
        assert session.run(_inputs())["logits"].tobytes() == first


def test_models_without_such_a_cache_are_refused(tiny: Callable[[str], Tiny], tmp_path: Path, invoke: Invoke) -> None:
    for name, what in (
        ("t5", "has an encoder: its decoder's cache grows by concatenation, and only GroupQueryAttention's holds int8"),
        ("bert", "writes no text (its task is 'text-classification')"),
    ):
        model = tiny(name)
        recipe = Recipe(model.adapters, str(model.base), tmp_path / "out", task=model.task, kv_cache="int8")
        with pytest.raises(RecipeError) as caught:
            export_bundle(recipe)
        assert str(caught.value) == f"kv_cache is 'int8', and base {what}\nHint: leave out --kv-cache"
        assert not list(tmp_path.iterdir())
    wrong = invoke("export", "a", "--base", "b", "-o", tmp_path / "out", "--kv-cache", "int4")
    assert wrong.exit_code == 2
    assert "'int4' is not one of 'float32', 'int8'" in " ".join(wrong.stderr.replace("│", " ").split())


def test_promoted_weights_go_on_with_it(tiny: Callable[[str], Tiny], tmp_path: Path, traced_once: None) -> None:
    model = tiny("llama")
    adapter = Path(shutil.copytree(model.adapters[0], tmp_path / "a"))
    quieter(adapter)
    recipe = Recipe((adapter,), str(model.base), tmp_path / "b.bundle", task=model.task, patches=True, kv_cache="int8")
    bundle = export_bundle(recipe)
    rows = [(row["adapter"], row["promoted"], row["mode"]) for row in bundle.manifest.quality]
    forms = ((None, False), ("a", False), ("a", True))
    assert rows == [(name, promoted, mode) for name, promoted in forms for mode in ("prefill", "decode")]
    with open_session(bundle, threads=1) as session:
        session.use("a")
        cache = session.new_cache(1, 8)
        session.step([[5, 6, 7]], cache)
        session.promote("a", wait=True)
        assert session.step([[8]], cache).shape == (1, 1, 128)
        assert session.form == "promoted"


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_windows_softcaps_and_other_rotary_embeddings(
    name: str, tiny: Callable[[str], Tiny], tmp_path: Path, traced_once: None
) -> None:
    """Sliding windows, capped scores, rotary inside and outside, two rotary embeddings."""
    model = tiny(name)
    recipe = Recipe(model.adapters, str(model.base), tmp_path / "b.bundle", task=model.task, kv_cache="int8")
    bundle = export_bundle(dataclasses.replace(recipe, quantize="int8"))
    assert len(bundle.manifest.quality) == 6
    assert all(row["mean_kl"] < 0.02 for row in bundle.manifest.quality)
