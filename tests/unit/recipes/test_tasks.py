"""The generated questions: the same at every call, answers that fit, nothing held out that training shows."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from pathlib import Path
from types import ModuleType

import pytest


def load(root: Path, name: str) -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location(name, root / "recipes" / "training" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["sql_task", "json_task"])
def test_held_out_questions_are_new_and_calls_repeat(root: Path, name: str) -> None:
    task = load(root, name)
    train, held_out = task.examples("train", task.TRAIN_COUNT), task.examples("held_out", 40)
    assert train == task.examples("train", task.TRAIN_COUNT)
    assert held_out == task.examples("held_out", 40)
    assert not {e["prompt"] for e in train} & {e["prompt"] for e in held_out}
    assert (len(train), len(held_out)) == (320, 40)


def test_every_sql_answer_runs_on_a_table_of_its_schema(root: Path) -> None:
    task = load(root, "sql_task")
    for split, count in (("train", 320), ("held_out", 200)):
        for example in task.examples(split, count):
            schema = example["prompt"].removeprefix("Table ").split(". ")[0]
            with sqlite3.connect(":memory:") as database:
                database.execute(f"CREATE TABLE {schema}")
                database.execute(example["answer"])


def test_every_json_answer_has_the_wanted_fields_with_values_from_the_sentence(root: Path) -> None:
    task = load(root, "json_task")
    absent = 0
    for example in task.examples("held_out", 200):
        wanted, _, sentence = example["prompt"].removeprefix("Extract ").partition(" as JSON: ")
        answer = json.loads(example["answer"])
        assert list(answer) == wanted.split(", ")
        assert all(value is None or str(value) in sentence for value in answer.values())
        absent += sum(value is None for value in answer.values())
    assert absent > 0
