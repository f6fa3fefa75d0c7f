"""One text while it is written: tokens drawn, pieces of text given out, the end found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeadapt.runtime.sampling import Sampling, StopFinder, pick
from edgeadapt.runtime.tokenizer import Detokenizer, TextCoder

Array = NDArray[Any]


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    text: new text only, without stop texts; token_ids: new tokens, without the end-of-sequence token
    adapter: the adapter that wrote it (see `Session.adapter`)
    finish_reason: "stop" at the end-of-sequence token or a stop text, "length" at the limit, "cancelled"
    prompt_tokens: tokens before the first new one (0 where the prompt is not text)
    cached_tokens: of those, how many were not read because the session's prefix cache held them
    guessed_tokens: new tokens that `lookup` had guessed right
    """

    text: str
    token_ids: tuple[int, ...]
    adapter: str | dict[str, float] | None
    finish_reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    cached_tokens: int = 0
    guessed_tokens: int = 0


class Writer:
    """The state of one text.

    token_ids: what was written so far; finish_reason: None while it goes on
    """

    def __init__(self, coder: TextCoder, options: Sampling, eos: Sequence[int], limit: int) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None
        self._options = options
        self._eos = () if options.ignore_eos else tuple(eos)
        self._limit = limit
        self._rng = np.random.default_rng(options.seed)
        self._text = Detokenizer(coder)
        self._stop = StopFinder(options.stop)

    @property
    def tokens_left(self) -> int:
        """How many more tokens may be written."""
        return self._limit - len(self.token_ids)

    def advance(self, logits: Array) -> str:
        """Choose a token from float32[vocab] and return the text that it completes."""
        token = pick(logits, self._options, self._rng)
        if token in self._eos:
            return self._end("stop")
        self.token_ids.append(token)
        piece = self._stop.push(self._text.push(token))
        if self._stop.found:
            self.finish_reason = "stop"
        elif not self.tokens_left:
            return piece + self._end("length")
        return piece

    def cancel(self) -> str:
        """End here; return the text that was held back."""
        return self._end("cancelled")

    def _end(self, reason: Literal["stop", "length", "cancelled"]) -> str:
        piece = self._stop.push(self._text.finish())
        self.finish_reason = "stop" if self._stop.found else reason
        return piece + self._stop.finish()
