"""A stand-in for a session: a table of logits per token, with faults that can be switched on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[Any]


class TableSession:
    """A decoder whose logits at a position depend on the tokens so far; every adapter adds a constant table.

    faults: mode of running ("chunks", "swap", "nan", adapter name) to a number that is added there
    """

    def __init__(self, decoder: bool = True) -> None:
        self.spec = SimpleNamespace(vocab_size=7, cache_dtype="float32") if decoder else None
        record = SimpleNamespace(labels=("no", "yes"))
        self.bundle = SimpleNamespace(
            manifest=SimpleNamespace(labels=(), adapters={"a": record, "b": SimpleNamespace(labels=())})
        )
        self.faults: dict[str, float] = {}
        self.adapter: str | None = None
        self.used: list[str | None] = []

    def use(self, adapter: str | None) -> None:
        self.adapter = adapter
        self.used.append(adapter)

    def table(self, adapter: str | None) -> Array:
        seed = {None: 0, "a": 1, "b": 2}[adapter]
        return np.random.default_rng(seed).standard_normal((11, 7)).astype(np.float32)

    def answers(self, adapter: str | None, case: dict[str, Array]) -> dict[str, Array]:
        logits = np.cumsum(self.table(adapter)[case["input_ids"]], axis=1, dtype=np.float32)
        return {"logits": logits * case["attention_mask"][..., None].astype(np.float32)}

    def run(self, inputs: dict[str, Array], *, chunk_size: int | None = None) -> dict[str, Array]:
        assert set(inputs) == {"input_ids", "attention_mask"}
        logits = self.answers(self.adapter, inputs)["logits"]
        logits = logits + np.float32(self.faults.get(str(self.adapter), 0))
        if chunk_size is not None:
            logits = logits + np.float32(self.faults.get(f"chunks of {chunk_size}", 0))
        if len(self.used) > 3:
            logits = logits + np.float32(self.faults.get("swap", 0))
        return {"logits": logits}


@pytest.fixture
def session() -> TableSession:
    return TableSession()


@pytest.fixture
def cases() -> list[dict[str, Array]]:
    """One row, and three rows of which two end early."""
    random = np.random.default_rng(3)
    mask = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
    return [
        {"input_ids": random.integers(0, 11, (1, 9)), "attention_mask": np.ones((1, 9), np.int64)},
        {"input_ids": random.integers(0, 11, (3, 7)), "attention_mask": mask},
    ]
