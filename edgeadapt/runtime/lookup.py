"""Prompt lookup: guesses at the next tokens, taken from what followed the same words earlier in the text.

A step over several tokens costs little more than over one, so guesses that come true are nearly free: quotes, names,
code that is edited, fields that are copied into JSON. Every token is still chosen from the model's own logits for it;
a guess only decides which logits are there already.
"""

from __future__ import annotations

from collections.abc import Sequence

_SIZES = (3, 2)
"""How many last tokens must have been there before; the longer is tried first."""
_FIRST_GUESS = 3


class Lookup:
    """The guesses for one text. They grow while they come true, up to `longest` tokens, and shrink when they do not."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._length = min(_FIRST_GUESS, longest)
        self._next: dict[tuple[int, ...], int] = {}  # some tokens -> where what follows them begins, the last time
        self._seen = 0

    def guess(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return what may follow `tokens` (the whole text so far), at most `room` tokens; empty if nothing is known."""
        for place in range(self._seen, len(tokens)):
            for size in _SIZES:
                if place >= size:
                    self._next[tuple(tokens[place - size : place])] = place
        self._seen = len(tokens)
        for size in _SIZES:
            found = self._next.get(tuple(tokens[-size:]))
            if found is not None:
                return list(tokens[found : found + min(self._length, room)])
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Take in how many of the guessed tokens were right."""
        if right == guessed:
            self._length = min(2 * self._length, self._longest)
        else:
            self._length = max(1, min(right + 1, self._longest))
