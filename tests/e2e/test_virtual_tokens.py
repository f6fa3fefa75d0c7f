"""Virtual tokens of every type that peft saves: prefixes of the key-value cache, swapped, batched, added, verified."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig

from edgeadapt.adapters import read_adapters
from edgeadapt.adapters.resolve import resolve
from edgeadapt.addition import add_adapter, remove_adapter, verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.errors import AdapterError, BundleError, MergeError, SessionError
from edgeadapt.merging.load import load_base_model
from edgeadapt.patching import variants_of
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import Session, open_session
from tests.e2e.reference import CLOSE, error, with_peft
from tests.e2e.tiny import save_adapter
from tests.e2e.virtual import CONFIGS, SMALL, VOCAB, logits_of, save_base, save_virtual, with_virtual, written_by
from tests.parity import Parity

LLAMA = transformers.LlamaForCausalLM
GEMMA = transformers.Gemma2ForCausalLM
GPT2 = transformers.GPT2LMHeadModel
TASKS = {"multi-task0": ("multi", 0), "multi-task1": ("multi", 1)}
GREEDY: Mapping[str, Any] = {"temperature": 0.0, "ignore_eos": True, "chat": False}


@dataclass(frozen=True)
class Virtual:
    """A base, adapters of virtual tokens for it by the name of their config, and a bundle of all of them."""

    base: Path
    folders: Mapping[str, Path]
    bundle: Path


def _inputs() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    mask = np.ones((3, 9), np.int64)
    mask[1, 6:] = mask[2, 2:] = 0
    return {"input_ids": generator.integers(3, 250, (3, 9)), "attention_mask": mask}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Virtual:
    """Grouped heads, and every type beside a LoRA adapter."""
    folder = tmp_path_factory.mktemp("virtual")
    base = save_base(LLAMA, transformers.LlamaConfig(**SMALL), folder / "base")
    folders = {name: save_virtual(LLAMA, base, name, folder / name) for name in CONFIGS}
    torch.manual_seed(9)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    folders["lora"] = save_adapter(LLAMA.from_pretrained(base), lora, folder / "lora")
    recipe = Recipe(
        tuple(folders.values()), str(base), folder / "llama.bundle", task="text-generation", quantize="none"
    )
    return Virtual(base, folders, export_bundle(recipe).path)


def test_every_type_is_peft_s_own_forward(llama: Virtual, parity: Parity) -> None:
    """Whole, in chunks, token by token, rows of several lengths; and there and back again to the bit."""
    inputs = _inputs()
    bundle = open_bundle(llama.bundle)
    assert set(bundle.adapter_names) == {*CONFIGS, "lora", *TASKS} - {"multi"}
    assert bundle.manifest.parity["max_relative_error"] < CLOSE
    modes = {(row["adapter"], row["mode"]) for row in bundle.manifest.parity["rows"]}
    assert {("prefix", "chunks of 3, batch"), ("prefix", "token by token, batch")} <= modes
    found: dict[str | None, bytes] = {}
    with open_session(bundle, threads=1) as session:
        for name in (*bundle.adapter_names, None):
            session.use(name)
            logits = session.run(inputs)["logits"]
            found[name] = logits.tobytes()
            if name is None or name == "lora":
                continue
            assert session.form == "plain"
            config, task = TASKS.get(name, (name, None))
            expected = logits_of(with_virtual(LLAMA, llama.base, llama.folders[config]), config, inputs, task)
            parity.add(
                llama.folders[config], "llama", adapter=config, errors={"swapped": error(expected, logits, inputs)}
            )
            assert error(expected, logits, inputs) < CLOSE, name
            for size in (1, 4):
                again = session.run(inputs, chunk_size=size)["logits"]
                assert error(expected, again, inputs) < CLOSE, (name, size)
        assert len(set(found.values())) == len(found)
        for name in reversed(found):
            session.use(name)
            assert session.run(inputs)["logits"].tobytes() == found[name]
        session.use("lora")
        expected = with_peft("llama", llama.base, llama.folders["lora"], inputs)
        assert error(expected, session.run(inputs)["logits"], inputs) < CLOSE
        rows = ["prefix", None, "lora"]
        mixed = session.run(inputs, adapters=rows)["logits"]
        for row, name in enumerate(rows):
            session.use(name)
            alone = session.run({key: value[row : row + 1] for key, value in inputs.items()})["logits"]
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            assert error(alone, mixed[row : row + 1], one) < CLOSE


def test_greedy_texts_are_peft_s_own(llama: Virtual) -> None:
    """Alone, with prompt lookup, in chunks, with a prefix cache, and in one batch with a text of each adapter."""
    names = ["prefix", "lora", "cpt", None, "cartridge", "multi-task1", "p-lstm", "prefix"]
    generator = np.random.default_rng(5)
    prompts = [generator.integers(3, 250, length).tolist() for length in (7, 4, 9, 3, 1, 6, 5, 2)]
    expected = {}
    for row, name in enumerate(names):
        if name in (None, "lora"):
            continue
        config, task = TASKS.get(str(name), (str(name), None))
        model = with_virtual(LLAMA, llama.base, llama.folders[config])
        expected[row] = written_by(model, prompts[row], 8, task)
    with open_session(llama.bundle, threads=1, prefix_cache_bytes=2**20) as session:
        for again in range(2):
            for row, name in enumerate(names):
                session.use(name)
                one = session.complete(prompts[row], max_new_tokens=8, **GREEDY, lookup=4, prefill_chunk=3)
                assert list(one.token_ids) == expected.setdefault(row, list(one.token_ids)), name
                assert one.prompt_tokens == len(prompts[row])
                assert one.cached_tokens == again * (len(prompts[row]) - 1)
    with open_session(llama.bundle, threads=1) as session:
        together = session.generate_batch(prompts, adapters=names, max_new_tokens=8, **GREEDY)
        assert [list(text.token_ids) for text in together] == [expected[row] for row in range(len(names))]
        assert [text.adapter for text in together] == names
        batch = session.batch(rows=2, max_length=40)  # fewer rows than texts: rows begin anew with other prefixes
        requests = [
            batch.submit(prompt, adapter=name, max_new_tokens=8, **GREEDY)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        assert [list(request.result().token_ids) for request in requests] == [
            expected[row] for row in range(len(names))
        ]


def test_room_is_what_the_virtual_tokens_leave(llama: Virtual) -> None:
    """The model has 64 positions, the cartridge takes 6 of them; a cache's own length is the user's."""
    with open_session(llama.bundle, threads=1) as session:
        session.use("cartridge")
        cache = session.new_cache(2, 58)
        session.step(np.full((2, 58), 7), cache, logits="none")
        assert cache.lengths.tolist() == [58, 58]
        with pytest.raises(SessionError) as caught:
            session.new_cache(1, 59)
        assert str(caught.value) == (
            "max_length is 59, and with the virtual tokens of adapter 'cartridge' this model holds 58\n"
            "Hint: give a whole number from 1 to 58"
        )
        with pytest.raises(SessionError, match="this model takes at most 58 beside its adapter's virtual tokens"):
            session.run({"input_ids": np.full((1, 59), 7)})
        text = session.complete([7] * 50, max_new_tokens=30, **GREEDY)
        assert (len(text.token_ids), text.finish_reason) == (8, "length")
        cache = session.new_cache(1, 4)
        session.use("prefix")  # nothing was fed yet: the cache begins with what is active at the first step
        first = session.step([[5, 6]], cache)
        with pytest.raises(SessionError) as caught:
            session.step([[5, 6, 7]], cache)
        assert "row 0 of the cache holds 2 tokens and 3 more do not fit into max_length 4" in str(caught.value)
        assert first.tobytes() == session.run({"input_ids": np.array([[5, 6]])})["logits"].tobytes()


def test_what_a_prefix_cannot_do_is_refused(llama: Virtual, tmp_path: Path) -> None:
    with open_session(llama.bundle, threads=1) as session:
        for blend in ({"prefix": 0.5, "lora": 0.5}, {"prefix": 0.5}):
            with pytest.raises(BundleError) as caught:
                session.use(blend)
            assert str(caught.value) == (
                "an adapter of the blend begins the text with virtual tokens: keys of two prefixes do not add, nor "
                "does a share of one mean anything\nHint: use that adapter alone, with weight 1"
            )
        session.use({"prefix": 1.0, "lora": 0.0})
        one = session.run(_inputs())["logits"]
        session.use("prefix")
        assert session.run(_inputs())["logits"].tobytes() == one.tobytes()
        with pytest.raises(BundleError, match="changes no weight: there is nothing to promote"):
            session.promote("prefix")
    recipe = Recipe((llama.folders["prefix"],), str(llama.base), tmp_path / "out.bundle", task="text-generation")
    with pytest.raises(MergeError) as refused:
        export_bundle(Recipe(**{**vars(recipe), "merge": True}))
    assert str(refused.value) == (
        "adapter 'prefix' begins texts with virtual tokens and changes no weight: it cannot be merged\n"
        "Hint: export it without --merge: it costs no more than its tokens"
    )
    assert not list(tmp_path.iterdir())
    base = load_base_model(llama.base, task="text-generation")
    resolved = [resolve(adapter, base.modules) for adapter in read_adapters(llama.folders["prefix"])]
    (variant,) = variants_of(base, resolved)
    assert variant.problem == "it begins texts with virtual tokens and changes no weight"


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_tied_weights_and_sliding_windows(quantize: str, tmp_path: Path, traced_once: None) -> None:
    """Gemma 2: tied, grouped heads, a window of 4 tokens; its bundle of prefixes alone has no slots graph."""
    config = transformers.Gemma2Config(**SMALL, head_dim=16, sliding_window=4)
    base = save_base(GEMMA, config, tmp_path / "base")
    names = ("prefix", "prompt")
    folders = [save_virtual(GEMMA, base, name, tmp_path / name) for name in names]
    recipe = Recipe(tuple(folders), str(base), tmp_path / "g.bundle", task="text-generation", quantize=quantize)
    bundle = export_bundle(recipe)
    assert bundle.manifest.parity["max_relative_error"] < CLOSE
    assert bundle.manifest.graphs["decoder"].slots is None
    assert [bundle.adapter_record(name).prefix_tokens for name in names] == [5, 4]
    assert verify_bundle(bundle.path) == []
    inputs = _inputs()
    with open_session(bundle, threads=1) as session:
        for name, folder in zip(names, folders, strict=True):
            session.use(name)
            expected = logits_of(with_virtual(GEMMA, base, folder), name, inputs)
            limit = CLOSE if quantize == "none" else 0.1
            assert error(expected, session.run(inputs)["logits"], inputs) < limit


def test_learned_positions(tmp_path: Path) -> None:
    """GPT-2: positions are looked up, and shift."""
    config = transformers.GPT2Config(**VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    base = save_base(GPT2, config, tmp_path / "base")
    folders = [save_virtual(GPT2, base, name, tmp_path / name) for name in ("cartridge", "p-mlp")]
    bundle = export_bundle(
        Recipe(tuple(folders), str(base), tmp_path / "g.bundle", task="text-generation", quantize="none")
    )
    assert bundle.manifest.parity["max_relative_error"] < CLOSE


def test_added_without_torch(llama: Virtual, tmp_path: Path) -> None:
    """Keys and values need numpy alone, and give what an export of the same adapter gives; embeddings need the base."""
    recipe = Recipe((llama.folders["lora"],), str(llama.base), tmp_path / "b.bundle", task="text-generation")
    bundle = export_bundle(Recipe(**{**vars(recipe), "quantize": "none"})).path
    code = (
        "import sys; from edgeadapt.addition import add_adapter\n"
        "for path in sys.argv[2:]: add_adapter(sys.argv[1], path)\n"
        "assert 'torch' not in sys.modules"
    )
    paths = [str(llama.folders[name]) for name in ("prefix", "projected", "cartridge")]
    subprocess.run([sys.executable, "-c", code, str(bundle), *paths], check=True)
    assert verify_bundle(bundle) == []
    with open_session(bundle, threads=1) as added, open_session(llama.bundle, threads=1) as exported:
        for name in ("prefix", "projected", "cartridge"):
            assert _logits(added, name) == _logits(exported, name)
    with pytest.raises(AdapterError) as caught:
        add_adapter(bundle, llama.folders["prompt"])
    assert str(caught.value) == (
        "adapter 'prompt': PROMPT_TUNING holds embeddings: the float base must be run over them once, and a bundle "
        "does not hold it\nHint: pass the base with --base, or export the bundle again together with this adapter"
    )


def test_added_with_the_base(llama: Virtual, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(llama.bundle, tmp_path / "b.bundle"))
    for name in ("prompt", "prefix"):
        remove_adapter(bundle, name)
        add_adapter(bundle, llama.folders[name], base=str(llama.base))
    assert verify_bundle(bundle) == []
    with open_session(bundle, threads=1) as added, open_session(llama.bundle, threads=1) as exported:
        for name in ("prompt", "prefix"):
            assert _logits(added, name) == _logits(exported, name)


def _logits(session: Session, name: str) -> bytes:
    session.use(name)
    return bytes(session.run(_inputs())["logits"].tobytes())
