"""Train an adapter that answers one task in SmolLM2-135M-Instruct's chat format, save it in float16, and score it.

    python recipes/training/train_chat.py sql --base SmolLM2-135M-Instruct.Q4_1.gguf -o recipes/adapters/sql
    python recipes/training/train_chat.py sql --kind ia3 --learning-rate 0.02 --base ... -o recipes/adapters/sql-ia3

Loss on the answer only. Deterministic on one machine (seeds, one thread). Writes the adapter, a README with the scores
and the base's fingerprint.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import json_task
import sql_task
import torch
from common import save_adapter, stamp, tokenizer_of
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model

from edgeadapt.merging.load import load_base_model

TASKS: dict[str, ModuleType] = {"sql": sql_task, "json": json_task}
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
HELD_OUT_COUNT = 40
EVALUATION_BATCH = 10
IGNORED = -100


def main() -> None:
    """Train, save, reload, score."""
    args = _arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    base = load_base_model(args.base, task="text-generation")
    tokenizer = tokenizer_of(base)
    task = TASKS[args.task]
    held_out = task.examples("held_out", HELD_OUT_COUNT)
    base_score = None if args.skip_base else exact_match(base.module, tokenizer, held_out)[0]

    model = get_peft_model(base.module, _config(args))
    started = time.perf_counter()
    loss = train(model, encode(tokenizer, task.examples("train", task.TRAIN_COUNT)), args)
    seconds = time.perf_counter() - started
    save_adapter(model, args.output, BASE_NAME, dtype=torch.float16)

    # Score the file as it ships (float16), through the library that saved it.
    bare = model.get_base_model() if args.kind == "prefix" else model.unload()
    shipped = PeftModel.from_pretrained(bare, args.output).eval()
    score, wrong = exact_match(shipped, tokenizer, held_out)
    for prompt, expected, got in wrong:
        print(f"wrong: {prompt}\n  expected {expected}\n  got      {got}", file=sys.stderr)
    _write_readme(args, base_score, score, loss)
    stamp(args.output, base, BASE_NAME)
    print(f"{args.task}: exact match base {base_score}, adapter {score:.3f}; loss {loss:.4f}; {seconds:.0f} s")


def _config(args: argparse.Namespace) -> PeftConfig:
    common = {"task_type": "CAUSAL_LM"}
    if args.kind == "ia3":
        return IA3Config(**common, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    if args.kind == "prefix":
        return PrefixTuningConfig(**common, num_virtual_tokens=args.virtual_tokens)
    rank = {"r": args.rank, "lora_alpha": 2 * args.rank, "lora_dropout": 0.0}
    return LoraConfig(**common, **rank, target_modules=LINEAR, use_dora=args.kind == "dora")


def _described(args: argparse.Namespace) -> str:
    return {
        "lora": f"LoRA r={args.rank} (alpha {2 * args.rank}) on every linear",
        "dora": f"DoRA r={args.rank} (alpha {2 * args.rank}) on every linear",
        "ia3": "IA3 on keys, values and the inputs of down_proj",
        "prefix": f"Prefix tuning with {args.virtual_tokens} virtual tokens",
    }[args.kind]


def encode(tokenizer: Any, examples: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(token ids, labels) per example; labels are IGNORED up to the answer."""
    encoded = []
    for example in examples:
        prompt = prompt_ids(tokenizer, example["prompt"])
        answer = tokenizer(example["answer"] + "<|im_end|>", add_special_tokens=False).input_ids
        encoded.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    return encoded


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The chat template's token ids for one user message, up to where the answer starts."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def train(model: Any, encoded: list[tuple[list[int], list[int]]], args: argparse.Namespace) -> float:
    """The mean loss of the last epoch; `model` is trained in place."""
    rng = random.Random(args.seed)  # noqa: S311 - a seed, not a secret
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    steps = args.epochs * (len(encoded) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    mean = 0.0
    for epoch in range(args.epochs):
        order = rng.sample(range(len(encoded)), len(encoded))
        losses = []
        for start in range(0, len(order) - args.batch + 1, args.batch):
            batch = [encoded[i] for i in order[start : start + args.batch]]
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):  # three times faster with AVX512-BF16
                loss = _batch_loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            print(f"epoch {epoch} step {len(losses)} loss {losses[-1]:.4f}", file=sys.stderr)
        mean = sum(losses) / len(losses)
    model.eval()
    return mean


def _batch_loss(model: Any, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch])
    if model.peft_config["default"].is_prompt_learning:  # its tokens come before the text's in peft's own forward
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state  # float32[batch, width, hidden]
    # The head (a fifth of the work) only where an answer's token is predicted.
    wanted = labels[:, 1:] != IGNORED
    logits = causal.lm_head(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted])


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, examples: list[dict[str, str]]) -> tuple[float, list[tuple[str, str, str]]]:
    """The share of greedy answers that equal the expected text, and the (prompt, expected, got) that do not."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    wrong = []
    for start in range(0, len(examples), EVALUATION_BATCH):
        batch = examples[start : start + EVALUATION_BATCH]
        prompts = [prompt_ids(tokenizer, example["prompt"]) for example in batch]
        width = max(len(ids) for ids in prompts)
        ids = torch.tensor([[end] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=end, pad_token_id=end
        )
        for example, row in zip(batch, out, strict=True):
            got = tokenizer.decode(row[width:], skip_special_tokens=True).strip()
            if got != example["answer"]:
                wrong.append((example["prompt"], example["answer"], got))
    return 1 - len(wrong) / len(examples), wrong


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--base", required=True, help="SmolLM2-135M-Instruct: GGUF file, folder or hub id")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--kind", choices=["lora", "dora", "ia3", "prefix"], default="lora")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--virtual-tokens", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast in training")
    parser.add_argument("--skip-base", action="store_true", help="do not score the base without the adapter")
    return parser.parse_args()


def _write_readme(args: argparse.Namespace, base_score: float | None, score: float, loss: float) -> None:
    base_line = "" if base_score is None else f"| base, no adapter | {base_score:.1%} |\n"
    flags = [] if args.kind == "lora" else [f"--kind {args.kind}"]
    flags += [f"--virtual-tokens {args.virtual_tokens}"] if args.kind == "prefix" else []
    flags += [f"--rank {args.rank}"] if "ora" in args.kind else []
    flags += [] if args.kind == "lora" else [f"--learning-rate {args.learning_rate:g} --epochs {args.epochs}"]
    text = f"""# {args.output.name}

{_described(args)} of {BASE_NAME}, float16.
Data: `recipes/training/{args.task}_task.py` ({TASKS[args.task].TRAIN_COUNT} training examples).

| exact match, {HELD_OUT_COUNT} held-out examples | |
|---|---|
{base_line}| with the adapter (PEFT, float32 base) | {score:.1%} |

Last epoch's training loss {loss:.4f}.

```
python recipes/training/train_chat.py {args.task} --base SmolLM2-135M-Instruct.Q4_1.gguf {" ".join(flags)} -o FOLDER
```
"""
    (args.output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
