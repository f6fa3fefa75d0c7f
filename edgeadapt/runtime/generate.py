"""Prompts in, text out: prefill, the loop over tokens, streaming and batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import SessionError
from edgeadapt.runtime.cache import Cache
from edgeadapt.runtime.chat import Message
from edgeadapt.runtime.sampling import Sampling, StopFinder, pick, sampling
from edgeadapt.runtime.tokenizer import Detokenizer, TextCoder

if TYPE_CHECKING:
    from edgeadapt.runtime.session import Session

Array = NDArray[Any]
Prompt = str | Sequence[int] | Sequence[Message] | Mapping[str, Any]
"""A text, token ids, chat messages, or the inputs of an encoder by name."""


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


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    text: new text only, without stop texts; token_ids: new tokens, without the end-of-sequence token
    adapter: the active adapter (see `Session.adapter`)
    finish_reason: "stop" at the end-of-sequence token or a stop text, "length" at the limit
    prompt_tokens: tokens read before the first new one (0 where the prompt is not text)
    """

    text: str
    token_ids: tuple[int, ...]
    adapter: str | dict[str, float] | None
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int


def stream(session: Session, prompt: Prompt, options: Mapping[str, Any]) -> Iterator[str]:
    """Return an iterator over pieces of text; see `Session.generate`. Arguments are checked now, not at the first."""
    loop = _Loop(session, [prompt], sampling(options))
    return (piece for _, piece in loop.run() if piece)


def batch(session: Session, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[Generation]:
    """Return one result per prompt; see `Session.generate_batch`."""
    loop = _Loop(session, prompts, sampling(options))
    texts = [""] * len(prompts)
    for row, piece in loop.run():
        texts[row] += piece
    return [
        Generation(
            text=text,
            token_ids=tuple(row.token_ids),
            adapter=session.adapter,
            finish_reason=row.finish_reason or "length",
            prompt_tokens=row.prompt_tokens,
        )
        for text, row in zip(texts, loop.rows, strict=True)
    ]


class _Row:
    """One sequence while it is written."""

    def __init__(self, index: int, coder: TextCoder, options: Sampling, prompt_tokens: int, limit: int) -> None:
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.limit = limit
        self.token_ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._options = options
        self._rng = np.random.default_rng(options.seed + index)
        self._text = Detokenizer(coder)
        self._stop = StopFinder(options.stop)

    def advance(self, logits: Array, eos: Sequence[int]) -> str:
        """Choose a token from float32[vocab] and return the text that it completes."""
        token = pick(logits, self._options, self._rng)
        if token in eos and not self._options.ignore_eos:
            return self._end("stop")
        self.token_ids.append(token)
        piece = self._stop.push(self._text.push(token))
        if self._stop.found:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.limit:
            return piece + self._end("length")
        return piece

    def _end(self, reason: Literal["stop", "length"]) -> str:
        piece = self._stop.push(self._text.finish())
        self.finish_reason = "stop" if self._stop.found else reason
        return piece + self._stop.finish()


class _Loop:
    """Checks prompts when made; `run` reads them and writes."""

    def __init__(self, session: Session, prompts: Sequence[Prompt], options: Sampling) -> None:
        if isinstance(prompts, str | bytes | Mapping) or not prompts:
            raise SessionError(
                f"prompts is {prompts!r}", hint="give a list of prompts; for one prompt use session.complete"
            )
        self._session = session
        self._options = options
        self._spec = session.require_decoder()
        self._reader = (_EncoderReader if session.has_encoder else _DecoderReader)(
            session, self._spec, prompts, options
        )
        coder = session.text
        self.rows = [
            _Row(index, coder, options, count, limit)
            for index, (count, limit) in enumerate(zip(self._reader.prompt_tokens, self._reader.limits, strict=True))
        ]

    def run(self) -> Iterator[tuple[int, str]]:
        """Yield (row, piece of text) as it comes; pieces may be empty."""
        eos = self._spec.eos_token_ids
        active = self.rows
        cache, logits = self._reader.read()
        while True:
            for position, row in enumerate(active):
                yield row.index, row.advance(logits[position, -1], eos)
            left = [position for position, row in enumerate(active) if row.finish_reason is None]
            if not left:
                return
            if len(left) < len(active):
                cache.keep(left)
                active = [active[position] for position in left]
            ids = np.asarray([[row.token_ids[-1]] for row in active], np.int64)
            logits = self._session.step(ids, cache, logits="last")


class _DecoderReader:
    """Prompts of a decoder-only model."""

    def __init__(self, session: Session, spec: DecoderSpec, prompts: Sequence[Prompt], options: Sampling) -> None:
        self._session, self._chunk = session, options.prefill_chunk
        self._prompts = [prompt_ids(session.text, prompt, options.chat) for prompt in prompts]
        self.prompt_tokens = [len(ids) for ids in self._prompts]
        self.limits = [_limit(spec, count, options) for count in self.prompt_tokens]
        for ids in self._prompts:
            _check_vocabulary(ids, spec)

    def read(self) -> tuple[Cache, Array]:
        """Read the prompts; return the cache and the logits after each, float32[batch, 1, vocab]."""
        lengths = np.asarray(self.prompt_tokens, np.int64)
        ids = np.zeros((len(lengths), int(lengths.max())), np.int64)
        for row, tokens in enumerate(self._prompts):
            ids[row, : len(tokens)] = tokens
        room = max(count + limit for count, limit in zip(self.prompt_tokens, self.limits, strict=True))
        cache = self._session.new_cache(len(lengths), room)
        if (lengths == lengths[0]).all():
            final = (ids.shape[1] - 1) // self._chunk * self._chunk
            self._read_chunks(ids[:, :final], np.full_like(lengths, final), cache)
            return cache, self._session.step(ids[:, final:], cache, logits="last")
        self._read_chunks(ids, lengths - 1, cache)
        last = np.take_along_axis(ids, lengths[:, None] - 1, axis=1)
        return cache, self._session.step(last, cache, logits="last")

    def _read_chunks(self, ids: Array, lengths: Array, cache: Cache) -> None:
        for first in range(0, int(lengths.max()), self._chunk):
            chunk = ids[:, first : first + self._chunk]
            counts = np.clip(lengths - first, 0, chunk.shape[1])
            self._session.step(chunk, cache, lengths=counts, logits="none")


class _EncoderReader:
    """Prompts of a sequence-to-sequence model: texts, or one mapping with the encoder's inputs."""

    def __init__(self, session: Session, spec: DecoderSpec, prompts: Sequence[Prompt], options: Sampling) -> None:
        if not spec.decoder_start_token_ids:
            raise SessionError(
                "the bundle does not say with which token its decoder starts (generation.decoder_start_token_ids)",
                hint="export the bundle again from a model with decoder_start_token_id in its config",
            )
        self._session, self._spec = session, spec
        self._inputs, self.prompt_tokens = _encoder_inputs(session, prompts, options)
        limit = _limit(spec, len(spec.decoder_start_token_ids), options)
        self.limits = [limit] * len(prompts)

    def read(self) -> tuple[Cache, Array]:
        """Run the encoder and the decoder's first tokens; return the cache and float32[batch, 1, vocab]."""
        start = np.asarray([self._spec.decoder_start_token_ids] * len(self.limits), np.int64)
        cache = self._session.encode(self._inputs, max_length=start.shape[1] + self.limits[0])
        return cache, self._session.step(start, cache, logits="last")


def _encoder_inputs(session: Session, prompts: Sequence[Prompt], options: Sampling) -> tuple[dict[str, Any], list[int]]:
    mappings = [prompt for prompt in prompts if isinstance(prompt, Mapping)]
    if mappings:
        if len(mappings) != len(prompts) or len({tuple(sorted(item)) for item in mappings}) != 1:
            raise SessionError("prompts are of different kinds", hint="give all as texts, or all as the same arrays")
        arrays = {name: np.concatenate([np.asarray(item[name]) for item in mappings]) for name in mappings[0]}
        rows = {len(value) for value in arrays.values()}
        if rows != {len(prompts)}:
            raise SessionError(
                f"the encoder's inputs have {sorted(rows)} rows for {len(prompts)} prompts",
                hint="give one row per prompt",
            )
        return arrays, [0] * len(prompts)
    if "input_ids" not in session.inputs("encoder"):
        raise SessionError(
            "this model does not read text",
            hint="give the encoder's inputs by name: " + ", ".join(session.inputs("encoder")),
        )
    tokens = [prompt_ids(session.text, prompt, options.chat) for prompt in prompts]
    counts = [len(ids) for ids in tokens]
    ids = np.full((len(tokens), max(counts)), session.text.pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, item in enumerate(tokens):
        ids[row, : len(item)], mask[row, : len(item)] = item, 1
    return {"input_ids": ids, "attention_mask": mask}, counts


def prompt_ids(coder: TextCoder, prompt: Prompt, chat: bool | None) -> list[int]:
    """Return a prompt's token ids.

    Args:
        coder: the bundle's tokenizer.
        prompt: a text, token ids, or chat messages.
        chat: for a text: True wraps it as a user's message, False takes it raw, None wraps it if there is a template.

    Raises:
        SessionError: if the prompt is none of these, or empty.
    """
    if isinstance(prompt, str):
        wrap = coder.chat_template is not None if chat is None else chat
        ids = coder.encode_chat([{"role": "user", "content": prompt}]) if wrap else coder.encode(prompt)
    elif isinstance(prompt, Sequence | np.ndarray) and len(prompt) and isinstance(prompt[0], Mapping):
        ids = coder.encode_chat([item for item in prompt if isinstance(item, Mapping)])
    elif isinstance(prompt, Sequence | np.ndarray) and all(isinstance(item, int | np.integer) for item in prompt):
        ids = np.asarray(prompt, np.int64).tolist()
    else:
        raise SessionError(
            f"a prompt is {type(prompt).__name__}", hint="give a text, a list of token ids, or a list of chat messages"
        )
    if not ids:
        raise SessionError("the prompt is empty", hint="give at least one token")
    return ids


def _limit(spec: DecoderSpec, prompt_tokens: int, options: Sampling) -> int:
    room = spec.max_length - prompt_tokens
    if room < 1:
        raise SessionError(
            f"the prompt has {prompt_tokens} tokens; this model holds at most {spec.max_length} with its answer",
            hint="shorten the prompt",
        )
    return min(options.max_new_tokens, room)


def _check_vocabulary(ids: Sequence[int], spec: DecoderSpec) -> None:
    for token in ids:
        if not 0 <= token < spec.vocab_size:
            raise SessionError(
                f"the prompt holds the token id {token}; the vocabulary has {spec.vocab_size} tokens",
                hint="encode the text with the bundle's own tokenizer",
            )
