"""A bundle's answers beside those of the library that trained its adapters: greedy tokens, and classes of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH = 16
MAX_TOKENS = 48
"""Longest text of the classifiers' training; see recipes/training/train_classifier.py."""


@dataclass(frozen=True)
class Agreement:
    """How far greedy tokens agree.

    steps: tokens compared
    answer: tokens of the reference up to the end of its text, that one included; `steps` if it does not end
    same_freely: tokens before the first difference, each side fed its own tokens
    same_when_fed: positions with the same likeliest token, both sides fed the reference's tokens
    """

    steps: int
    answer: int
    same_freely: int
    same_when_fed: int

    @property
    def same_answer(self) -> bool:
        """Whether all of the reference's answer came out."""
        return self.same_freely >= self.answer


class Peft:
    """A base in torch with adapters of which one or none is active, by peft alone."""

    def __init__(self, module: torch.nn.Module, adapters: dict[str, Path]) -> None:
        from peft import PeftModel

        (first, path), *others = adapters.items()
        self._model: Any = PeftModel.from_pretrained(module, str(path), adapter_name=first)
        for name, folder in others:
            self._model.load_adapter(str(folder), adapter_name=name)
        self._model.eval()

    @contextmanager
    def active(self, adapter: str | None) -> Iterator[Any]:
        """Give the model with one adapter, or the bare base."""
        if adapter is None:
            with self._model.disable_adapter():
                yield self._model
        else:
            self._model.set_adapter(adapter)
            yield self._model

    @torch.no_grad()
    def greedy(self, adapter: str | None, prompt: Sequence[int], steps: int) -> list[int]:
        """`steps` likeliest tokens after `prompt`, the end of the text not obeyed."""
        ids, cache, tokens = torch.tensor([list(prompt)]), None, []
        with self.active(adapter) as model:
            for _ in range(steps):
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                tokens.append(int(ids))
        return tokens

    @torch.no_grad()
    def classes(self, adapter: str, tokenizer: Any, texts: Sequence[str]) -> list[int]:
        """The likeliest class of each text."""
        found: list[int] = []
        with self.active(adapter) as model:
            for start in range(0, len(texts), BATCH):
                batch = list(texts[start : start + BATCH])
                encoded = tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
                found += model(**encoded).logits.argmax(-1).tolist()
        return found


def agreement(session: Any, adapter: str | None, prompt: Sequence[int], expected: Sequence[int]) -> Agreement:
    """How far a session's greedy tokens after `prompt` are the `expected` ones, of `Peft.greedy`."""
    session.use(adapter)
    steps = len(expected)
    own = session.complete(list(prompt), max_new_tokens=steps, ignore_eos=True).token_ids
    different = [step for step in range(steps) if own[step] != expected[step]]
    ends = [step for step in range(steps) if expected[step] in session.spec.eos_token_ids]
    fed = np.asarray([[*prompt, *expected[:-1]]], np.int64)
    likeliest = session.run({"input_ids": fed})["logits"][0, len(prompt) - 1 :].argmax(-1)
    return Agreement(
        steps=steps,
        answer=ends[0] + 1 if ends else steps,
        same_freely=different[0] if different else steps,
        same_when_fed=int((likeliest == np.asarray(expected)).sum()),
    )


def labels(session: Any, adapter: str, texts: Sequence[str]) -> list[str]:
    """The likeliest class of each text, by name, as a session of a text classifier says."""
    from edgeadapt.runtime.tasks import answer

    session.use(adapter)
    found: list[str] = []
    for start in range(0, len(texts), BATCH):
        found += [row["label"] for row in answer(session, texts=texts[start : start + BATCH])]
    return found


def share_right(found: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of equal labels."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
