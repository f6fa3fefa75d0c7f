"""How greedy tokens are compared with peft's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.against_peft import Agreement, agreement, share_right


class Counter:
    """A session of a model that counts on from the last token, to 9, but says 7 after `wrong` tokens."""

    def __init__(self, wrong: int | None) -> None:
        self.wrong = wrong
        self.spec = SimpleNamespace(eos_token_ids=(6,))
        self.used: list[str | None] = []

    def use(self, adapter: str | None) -> None:
        self.used.append(adapter)

    def _next(self, tokens: list[int]) -> int:
        return 7 if len(tokens) == self.wrong else min(tokens[-1] + 1, 9)

    def complete(self, prompt: list[int], *, max_new_tokens: int, ignore_eos: bool) -> Any:
        assert ignore_eos
        tokens = list(prompt)
        for _ in range(max_new_tokens):
            tokens.append(self._next(tokens))
        return SimpleNamespace(token_ids=tuple(tokens[len(prompt) :]))

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        (ids,) = inputs["input_ids"].tolist()
        return {"logits": np.eye(10)[[self._next(ids[: end + 1]) for end in range(len(ids))]][None]}


def test_all_tokens_agree() -> None:
    session = Counter(wrong=None)
    found = agreement(session, "a", [1, 2, 3], [4, 5, 6, 7, 8])
    assert found == Agreement(steps=5, answer=3, same_freely=5, same_when_fed=5)
    assert (found.same_answer, session.used) == (True, ["a"])


def test_one_token_differs_and_leads_elsewhere() -> None:
    found = agreement(Counter(wrong=4), None, [1, 2, 3], [4, 5, 6, 7, 8])
    assert found == Agreement(steps=5, answer=3, same_freely=1, same_when_fed=4)
    assert not found.same_answer


def test_a_difference_behind_the_answer_is_not_the_answers() -> None:
    found = agreement(Counter(wrong=6), None, [1, 2, 3], [4, 5, 6, 5, 6])
    assert (found.answer, found.same_freely, found.same_answer) == (3, 3, True)


def test_an_answer_that_does_not_end_is_all_steps() -> None:
    assert agreement(Counter(wrong=None), None, [7], [8, 9, 9]).answer == 3


def test_share_of_equal_labels() -> None:
    assert share_right(["a", "b", "b", "a"], ["a", "b", "a", "a"]) == 0.75
