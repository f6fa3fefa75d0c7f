"""Which token comes next, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import SessionError
from edgeadapt.runtime.checks import is_finite, is_whole

Array = NDArray[Any]


_FEW = 256
"""Tokens that are looked at first where all may be drawn."""


class Options(TypedDict, total=False):
    """The keyword arguments of `Session.generate`; see `Sampling`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: str | Sequence[str]
    chat: bool | None
    ignore_eos: bool
    prefill_chunk: int
    lookup: int


@dataclass(frozen=True)
class Sampling:
    """How text is written.

    max_new_tokens: at most so many tokens (fewer if the model's longest sequence is reached)
    temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn
    top_k: draw from the k likeliest tokens only, 0 for all
    top_p: draw from the likeliest tokens that together reach this probability
    seed: the same seed draws the same tokens
    stop: texts that end the writing; they are not part of the answer
    chat: True wraps a text as a user's message, False takes it raw, None wraps it if there is a chat template
    ignore_eos: write on past the end-of-sequence token (for measurements)
    prefill_chunk: read the prompt in chunks of so many tokens
    lookup: guess up to so many next tokens from earlier text and check them in one step, 0 for none; for texts that
        repeat what the prompt says. It has no effect while several texts are written together
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    chat: bool | None = None
    ignore_eos: bool = False
    prefill_chunk: int = 512
    lookup: int = 0


def sampling(options: Mapping[str, Any]) -> Sampling:
    """Return checked options.

    Raises:
        SessionError: naming the option, for an unknown one or a value out of range.
    """
    known = {item.name for item in fields(Sampling)}
    for name in options:
        if name not in known:
            raise SessionError(f"unknown option {name!r}", hint=f"known: {', '.join(sorted(known))}")
    stop = options.get("stop", ())
    texts = (stop,) if isinstance(stop, str) else stop
    stops = tuple(texts) if isinstance(texts, Sequence) else (None,)
    chosen = Sampling(**{**options, "stop": stops})
    for name, low in (("max_new_tokens", 1), ("top_k", 0), ("seed", 0), ("prefill_chunk", 1), ("lookup", 0)):
        _check(name, getattr(chosen, name), is_whole(getattr(chosen, name), low), f"a whole number of {low} or more")
    _check("temperature", chosen.temperature, is_finite(chosen.temperature, 0), "0 or more")
    _check("top_p", chosen.top_p, is_finite(chosen.top_p, 0, 1) and chosen.top_p > 0, "above 0 and at most 1")
    _check("stop", stop, all(isinstance(text, str) and text for text in stops), "texts that are not empty")
    _check("chat", chosen.chat, chosen.chat in (None, True, False), "True, False or None")
    _check("ignore_eos", chosen.ignore_eos, isinstance(chosen.ignore_eos, bool), "True or False")
    return chosen


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise SessionError(f"{name} is {value!r}", hint=f"give {expected}")


def pick(logits: Array, options: Sampling, rng: np.random.Generator) -> int:
    """Return the next token for float32[vocab] logits.

    The order is temperature, top-k, top-p, as in transformers.
    """
    if options.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / options.temperature
    weights = np.exp(scaled - scaled.max())
    drawn = float(rng.random())
    count = options.top_k or _FEW
    while True:  # sorting the whole vocabulary takes as long as the model: a few tokens have nearly all the weight
        order = _likeliest(scaled, count)
        sums = np.cumsum(weights[order])
        whole = len(order) == len(scaled) or bool(options.top_k)
        total = float(sums[-1] if whole else weights.sum())
        # the token that crosses the limit still belongs, so at least one is left
        kept = len(order) if options.top_p == 1 else int(np.searchsorted(sums, options.top_p * total)) + 1
        limit = total if options.top_p == 1 else float(sums[min(kept, len(order)) - 1])
        place = int(np.searchsorted(sums, drawn * limit, side="right"))
        if whole or (kept <= len(order) and place < len(order)):
            return int(order[min(place, kept - 1, len(order) - 1)])
        count *= 16


def _likeliest(scaled: Array, count: int) -> Array:
    """Return the indices of the `count` largest numbers, largest first, of equal ones the earlier."""
    if count >= len(scaled):
        return np.argsort(-scaled, kind="stable")
    least = np.partition(scaled, -count)[-count]
    found = np.flatnonzero(scaled >= least)
    return found[np.argsort(-scaled[found], kind="stable")][:count]


class StopFinder:
    """Holds text back for as long as it may be the beginning of a stop text."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Return the text that is certainly not part of a stop text; nothing more after one was found."""
        if self.found:
            return ""
        self._held += piece
        places = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if places:
            self.found = True
            return self._release(min(places))
        return self._release(len(self._held) - self._possible_start())

    def finish(self) -> str:
        """Return what was held back."""
        return "" if self.found else self._release(len(self._held))

    def _possible_start(self) -> int:
        """Return how many characters at the end could still grow into a stop text."""
        longest = max((len(text) for text in self._stop), default=0) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-size:]) for text in self._stop):
                return size
        return 0

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        return piece
