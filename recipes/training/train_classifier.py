"""Train a LoRA with a classification head on all-MiniLM-L6-v2, save it, and score it.

    python recipes/training/train_classifier.py debian-section --base all-MiniLM-L6-v2 -o FOLDER

Data: recipes/data/NAME.train.jsonl and NAME.test.jsonl, lines of {"text", "label"}. Deterministic on one machine
(seeds, one thread). Writes the adapter, labels.json, a README with the scores and the base's fingerprint.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import save_adapter, stamp, tokenizer_of
from peft import LoraConfig, PeftModel, get_peft_model

from edgeadapt.merging.load import load_base_model

DATA = Path(__file__).resolve().parent.parent / "data"
BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MAX_TOKENS = 48
SCORING_BATCH = 32

Row = dict[str, str]


def main() -> None:
    """Train, save, reload, score."""
    args = _arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rows, test = read_rows(f"{args.name}.train.jsonl"), read_rows(f"{args.name}.test.jsonl")
    labels = sorted({row["label"] for row in rows})
    base = load_base_model(args.base, task="text-classification", num_labels=len(labels))
    tokenizer = tokenizer_of(base)

    config = LoraConfig(
        task_type="SEQ_CLS",
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0.1,
        target_modules=["dense", "key", "query", "value"],  # peft adds the head: modules_to_save "classifier"
    )
    model = get_peft_model(base.module, config)
    started = time.perf_counter()
    loss = train(model, tokenizer, rows, labels, args)
    seconds = time.perf_counter() - started
    save_adapter(model, args.output, BASE_NAME, dtype=torch.float32)
    (args.output / "labels.json").write_text(json.dumps({"labels": labels}, indent=2) + "\n", encoding="utf-8")

    # Score the file as it ships, in a base that never saw the training.
    fresh = load_base_model(args.base, task="text-classification", num_labels=len(labels))
    shipped = PeftModel.from_pretrained(fresh.module, args.output).eval()
    score = accuracy(shipped, tokenizer, test, labels)
    _write_readme(args, labels, rows, test, score)
    stamp(args.output, base, BASE_NAME)
    print(f"{args.name}: test accuracy {score:.3f}; last epoch's loss {loss:.4f}; {seconds:.0f} s")


def read_rows(file: str) -> list[Row]:
    """The rows of a jsonl file in recipes/data."""
    return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


def train(model: Any, tokenizer: Any, rows: list[Row], labels: list[str], args: argparse.Namespace) -> float:
    """The mean loss of the last epoch; `model` is trained in place."""
    rng = random.Random(args.seed)  # noqa: S311 - a seed, not a secret
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01)
    steps = args.epochs * (len(rows) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    mean = 0.0
    for epoch in range(args.epochs):
        order = rng.sample(range(len(rows)), len(rows))
        losses = []
        for start in range(0, len(order) - args.batch + 1, args.batch):
            batch = [rows[i] for i in order[start : start + args.batch]]
            wanted = torch.tensor([labels.index(row["label"]) for row in batch])
            loss = torch.nn.functional.cross_entropy(model(**_encode(tokenizer, batch)).logits, wanted)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"epoch {epoch} loss {mean:.4f}", file=sys.stderr)
    model.eval()
    return mean


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: list[Row], labels: list[str]) -> float:
    """The share of rows whose highest logit is the right label."""
    right = 0
    for start in range(0, len(rows), SCORING_BATCH):
        batch = rows[start : start + SCORING_BATCH]
        best = model(**_encode(tokenizer, batch)).logits.argmax(-1).tolist()
        right += sum(labels[i] == row["label"] for i, row in zip(best, batch, strict=True))
    return right / len(rows)


def _encode(tokenizer: Any, rows: list[Row]) -> dict[str, torch.Tensor]:
    texts = [row["text"] for row in rows]
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="data set in recipes/data: debian-section or debian-kind")
    parser.add_argument("--base", required=True, help="all-MiniLM-L6-v2: folder or hub id")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _write_readme(args: argparse.Namespace, labels: list[str], rows: list[Row], test: list[Row], score: float) -> None:
    text = f"""# {args.name}

LoRA r={args.rank} (alpha {2 * args.rank}) on query, key, value and dense of {BASE_NAME}, with a classification head
for {len(labels)} labels ({", ".join(labels)}; order in `labels.json`), float32.
Data: `recipes/data/{args.name}.train.jsonl` ({len(rows)} rows), `{args.name}.test.jsonl` ({len(test)} rows).

| test accuracy, {len(test)} rows | |
|---|---|
| chance | {1 / len(labels):.1%} |
| with the adapter (PEFT, float32 base) | {score:.1%} |

```
python recipes/training/train_classifier.py {args.name} --base sentence-transformers/all-MiniLM-L6-v2 -o FOLDER
```
"""
    (args.output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
