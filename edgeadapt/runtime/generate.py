"""Prompts in, text out, for whole texts; decoders write in a `Batch`, sequence-to-sequence models in a loop here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import SessionError
from edgeadapt.runtime.batch import Batch, Request
from edgeadapt.runtime.cache import Cache
from edgeadapt.runtime.groups import Adapter, by_adapter
from edgeadapt.runtime.prompts import Prompt, answer_limit, prompt_ids
from edgeadapt.runtime.sampling import Sampling, sampling
from edgeadapt.runtime.writer import Generation, Writer

if TYPE_CHECKING:
    from edgeadapt.runtime.session import Session

Array = NDArray[Any]


def stream(session: Session, prompt: Prompt, options: Mapping[str, Any]) -> Iterator[str]:
    """Return an iterator over pieces of text; see `Session.generate`. Arguments are checked now, not at the first."""
    if session.has_encoder:
        loop = _EncoderLoop(session, [prompt], sampling(options))
        return (piece for _, piece in loop.run() if piece)
    return iter(_submit(session, [prompt], None, options)[0])


def batch(
    session: Session, prompts: Sequence[Prompt], adapters: Sequence[Adapter] | None, options: Mapping[str, Any]
) -> list[Generation]:
    """Return one result per prompt; see `Session.generate_batch`."""
    if isinstance(prompts, str | bytes | Mapping) or not prompts:
        raise SessionError(
            f"prompts is {prompts!r}", hint="give a list of prompts; for one prompt use session.complete"
        )
    if adapters is not None and (isinstance(adapters, str | Mapping) or len(adapters) != len(prompts)):
        raise SessionError(
            f"adapters is {adapters!r} for {len(prompts)} prompts", hint="give one adapter (or None) per prompt"
        )
    if not session.has_encoder:
        return [request.result() for request in _submit(session, prompts, adapters, options)]
    chosen = sampling(options)
    if adapters is None:
        return _EncoderLoop(session, prompts, chosen).results()
    results: dict[int, Generation] = {}

    def write(rows: list[int]) -> None:
        loop = _EncoderLoop(session, [prompts[row] for row in rows], chosen, seeds=[chosen.seed + row for row in rows])
        results.update(zip(rows, loop.results(), strict=True))

    by_adapter(session, adapters, write)
    return [results[row] for row in range(len(prompts))]


def _submit(
    session: Session, prompts: Sequence[Prompt], adapters: Sequence[Adapter] | None, options: Mapping[str, Any]
) -> list[Request]:
    """Return one request per prompt, all in one batch that is just large enough."""
    chosen = sampling(options)
    ids = [prompt_ids(session.text, prompt, chosen.chat) for prompt in prompts]
    keys = [session.active.key_of(adapter) for adapter in ([...] * len(ids) if adapters is None else adapters)]
    room = max(
        len(row) + answer_limit(session.room_beside(key), len(row), chosen.max_new_tokens)
        for row, key in zip(ids, keys, strict=True)
    )
    together = Batch(session, len(ids), room)
    return [together.take(row, keys[index], replace(chosen, seed=chosen.seed + index)) for index, row in enumerate(ids)]


class _EncoderLoop:
    """Writes with a sequence-to-sequence model. Checks prompts when made; `run` reads them and writes."""

    def __init__(
        self, session: Session, prompts: Sequence[Prompt], options: Sampling, seeds: Sequence[int] | None = None
    ) -> None:
        self._session = session
        self._spec = session.require_decoder()
        self._reader = _EncoderReader(session, self._spec, prompts, options)
        drawn = [replace(options, seed=options.seed + row) for row in range(len(prompts))]
        if seeds is not None:
            drawn = [replace(options, seed=seed) for seed in seeds]
        self._writers = [
            Writer(session.text, own, self._spec.eos_token_ids, limit)
            for own, limit in zip(drawn, self._reader.limits, strict=True)
        ]

    def results(self) -> list[Generation]:
        """Write all texts to their ends."""
        texts = [""] * len(self._writers)
        for row, piece in self.run():
            texts[row] += piece
        return [
            Generation(
                text=text,
                token_ids=tuple(writer.token_ids),
                adapter=self._session.adapter,
                finish_reason=writer.finish_reason or "length",
                prompt_tokens=count,
            )
            for text, writer, count in zip(texts, self._writers, self._reader.prompt_tokens, strict=True)
        ]

    def run(self) -> Iterator[tuple[int, str]]:
        """Yield (row, piece of text) as it comes; pieces may be empty."""
        active = list(enumerate(self._writers))
        cache, logits = self._reader.read()
        while True:
            for position, (row, writer) in enumerate(active):
                yield row, writer.advance(logits[position, -1])
            left = [position for position, (_, writer) in enumerate(active) if writer.finish_reason is None]
            if not left:
                return
            if len(left) < len(active):
                cache.keep(left)
                active = [active[position] for position in left]
            ids = np.asarray([[writer.token_ids[-1]] for _, writer in active], np.int64)
            logits = self._session.step(ids, cache, logits="last")


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
        limit = answer_limit(spec.max_length, len(spec.decoder_start_token_ids), options.max_new_tokens)
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
