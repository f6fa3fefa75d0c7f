"""Prompts, and held-out texts to measure quality on: token ids of what lies in recipes/."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PROMPT_TOKENS, LONG_PROMPT_TOKENS = 128, 512
NEW_TOKENS, CHUNKS = 128, 4
HELD_OUT_TOKENS = 384


@dataclass(frozen=True)
class Workload:
    """Token ids. prompt: 128 tokens; long_prompt: 512; held_out: by adapter, texts that no adapter was trained on."""

    prompt: list[int]
    long_prompt: list[int]
    held_out: dict[str | None, list[int]]


def read_workload(tokenizer_file: Path) -> Workload:
    """The workload in the tokens of one tokenizer."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(tokenizer_file))

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    prose = ids(_descriptions("debian-section"))
    sys.path.insert(0, str(REPOSITORY / "recipes" / "training"))
    import json_task
    import sql_task

    chats = {
        name: ids(_chats(task.examples("held_out", 16))) for name, task in (("sql", sql_task), ("json", json_task))
    }
    general = ids(_descriptions("debian-kind"))
    held_out: dict[str | None, list[int]] = {None: general[:HELD_OUT_TOKENS]}
    for name, chat in chats.items():
        held_out[name] = chat[:HELD_OUT_TOKENS]
    return Workload(prose[:PROMPT_TOKENS], prose[:LONG_PROMPT_TOKENS], held_out)


def _descriptions(name: str) -> str:
    rows = (REPOSITORY / "recipes" / "data" / f"{name}.test.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(json.loads(row)["text"] for row in rows)


def _chats(examples: list[dict[str, str]]) -> str:
    """Questions with right answers, in the model's chat format."""
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    return "".join(
        f"{system}<|im_start|>user\n{example['prompt']}<|im_end|>\n<|im_start|>assistant\n{example['answer']}<|im_end|>\n"
        for example in examples
    )
