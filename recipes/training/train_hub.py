"""Train an adapter of AdapterHub's library with a classification head on all-MiniLM-L6-v2, save it, and score it.

    python recipes/training/train_hub.py pfeiffer --base all-MiniLM-L6-v2 -o FOLDER
    python recipes/training/train_hub.py fusion --parts ONE TWO --base all-MiniLM-L6-v2 -o FOLDER

Houlsby's and Pfeiffer's bottlenecks (`double_seq_bn`, `seq_bn`), or AdapterFusion over two that were trained before,
for a data set in recipes/data. Deterministic on one machine (seeds, one thread). Writes the adapter, labels.json, a
README with the score, and the base's fingerprint.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters.composition import Fuse
from common import stamp, tokenizer_of
from train_classifier import BASE_NAME, accuracy, read_rows, train

from edgeadapt.merging.load import load_base_model

CONFIGS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=8),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=8),
}


def main() -> None:
    """Train, save, reload, score."""
    args = _arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rows, test = read_rows(f"{args.data}.train.jsonl"), read_rows(f"{args.data}.test.jsonl")
    labels = sorted({row["label"] for row in rows})
    model, tokenizer = _base(args, labels)
    setup: Any = args.data
    if args.kind == "fusion":
        setup = Fuse(*(model.load_adapter(str(part), with_head=False, use_safetensors=True) for part in args.parts))
        model.add_adapter_fusion(setup)
        model.train_adapter_fusion(setup)
    else:
        model.add_adapter(args.data, config=CONFIGS[args.kind])
        model.train_adapter(args.data)
    model.classifier.requires_grad_(True)  # a base is loaded frozen, its head too
    started = time.perf_counter()
    loss = train(model, tokenizer, rows, labels, args)
    seconds = time.perf_counter() - started
    args.output.mkdir(parents=True, exist_ok=True)
    model.config.name_or_path = BASE_NAME
    if args.kind == "fusion":
        model.save_adapter_setup(str(args.output), setup, use_safetensors=True)
        for part in setup.children:
            model.save_adapter(str(args.output / part), part, use_safetensors=True)
    else:
        model.save_adapter(str(args.output), args.data, use_safetensors=args.kind != "houlsby")

    # Score the files as they ship, in a base that never saw the training.
    fresh, _ = _base(args, labels)
    if args.kind == "fusion":
        fresh.load_adapter_setup(str(args.output), set_active=True, use_safetensors=True)
    else:
        fresh.load_adapter(str(args.output), set_active=True, use_safetensors=args.kind != "houlsby")
    score = accuracy(fresh.eval(), tokenizer, test, labels)
    (args.output / "labels.json").write_text(json.dumps({"labels": labels}, indent=2) + "\n", encoding="utf-8")
    _write_readme(args, labels, len(rows), len(test), score)
    stamp(args.output, load_base_model(args.base, task="text-classification", num_labels=len(labels)), BASE_NAME)
    print(f"{args.kind}: test accuracy {score:.3f}; last epoch's loss {loss:.4f}; {seconds:.0f} s")


def _base(args: argparse.Namespace, labels: list[str]) -> tuple[Any, Any]:
    base = load_base_model(args.base, task="text-classification", num_labels=len(labels))
    adapters.init(base.module)
    return base.module, tokenizer_of(base)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*CONFIGS, "fusion"])
    parser.add_argument("--data", default="debian-section", help="data set in recipes/data")
    parser.add_argument("--parts", nargs="*", type=Path, default=[], help="folders of the adapters that are fused")
    parser.add_argument("--base", required=True, help="all-MiniLM-L6-v2: folder or hub id")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _write_readme(args: argparse.Namespace, labels: list[str], trained: int, tested: int, score: float) -> None:
    what = f"AdapterFusion of {' and '.join(part.name for part in args.parts)}" if args.parts else args.kind.title()
    text = f"""# {args.output.name}

{what}, saved by adapters {adapters.__version__}, on {BASE_NAME}, with a head for {len(labels)} labels
({", ".join(labels)}; order in `labels.json`).
Data: `recipes/data/{args.data}.train.jsonl` ({trained} rows), `{args.data}.test.jsonl` ({tested} rows).

| test accuracy, {tested} rows | |
|---|---|
| chance | {1 / len(labels):.1%} |
| with the adapter (adapters, float32 base) | {score:.1%} |
"""
    (args.output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
