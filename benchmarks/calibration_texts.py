"""What int4 is fitted to in the benchmarks: Python's own help topics, and training examples of the adapters' tasks."""

from __future__ import annotations

import json
import pydoc_data.topics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "training"))

import json_task
import sql_task

TASKS = {"sql": sql_task, "json": json_task}
TOPICS, TOPIC_CHARACTERS, TOPIC_PARTS = 48, 1800, 2


def general() -> list[dict[str, Any]]:
    """Texts that belong to no adapter."""
    topics = pydoc_data.topics.topics
    longest = sorted(topics, key=lambda key: (-len(topics[key]), key))[:TOPICS]
    parts = [
        topics[name][part * TOPIC_CHARACTERS : (part + 1) * TOPIC_CHARACTERS]
        for name in longest
        for part in range(TOPIC_PARTS)
    ]
    return [{"text": part} for part in parts if part.strip()]


def task_samples(split: str, count: int) -> list[dict[str, Any]]:
    """`count` chats of each adapter's task, with the adapter's name; split: "train" or "held_out"."""
    return [_chat(name, example) for name, task in TASKS.items() for example in task.examples(split, count)]


def write_lines(path: Path, samples: Sequence[Mapping[str, Any]]) -> Path:
    """Write samples as a .jsonl file."""
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return path


def _chat(adapter: str, example: Mapping[str, str]) -> dict[str, Any]:
    turns = [{"role": "user", "content": example["prompt"]}, {"role": "assistant", "content": example["answer"]}]
    return {"messages": turns, "adapter": adapter}
