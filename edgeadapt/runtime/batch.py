"""Continuous batching: texts written together, one step at a time; requests join and leave between steps.

Rows of the cache 0 to n-1 are those of the n texts that are being written, so that a step runs on the front of the
buffers. When one ends, the last takes its row. Prompts are read on the rows behind them: short ones together, whole;
long ones alone and in chunks, since GroupQueryAttention takes several tokens on top of a past for one row only. For the
same reason those whose adapter begins with virtual tokens are read alone.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from edgeadapt.runtime.cache import AdapterKey, SharedCache
from edgeadapt.runtime.lookup import Lookup
from edgeadapt.runtime.prefixes import ContentKey
from edgeadapt.runtime.prompts import Prompt, answer_limit, check_vocabulary, prompt_ids
from edgeadapt.runtime.rowwise import RowBindings
from edgeadapt.runtime.sampling import Sampling, sampling
from edgeadapt.runtime.step import run_step
from edgeadapt.runtime.writer import Generation, Writer

if TYPE_CHECKING:
    from edgeadapt.runtime.ort import Binding
    from edgeadapt.runtime.sampling import Options
    from edgeadapt.runtime.session import Session

Array = NDArray[Any]
_READ_PER_STEP = 512
"""Prompt tokens after which a step goes on to write, so that those who join do not stop the others for long."""
_WORTH_A_RUN = 16
"""Tokens of padding that it may cost to read a prompt with others, in no run of its own."""


class Request:
    """One text of a `Batch`: iterate over it for pieces of text as they come, or take its `result`.

    Both do the batch's steps as needed, which advances its other texts too.
    """

    def __init__(self, batch: Batch, key: AdapterKey, ids: list[int], options: Sampling, writer: Writer) -> None:
        self.key = key
        self.ids = ids
        self.options = options
        self.writer = writer
        self.content: ContentKey = ()  # known once it is read, if there is a prefix cache
        self.promoted = False
        self.cached_tokens = 0
        self.guessed_tokens = 0
        self._batch = batch
        self._pieces: list[str] = []
        self._lookup = Lookup(options.lookup) if options.lookup else None

    def __iter__(self) -> Iterator[str]:
        given = 0
        while True:
            while given < len(self._pieces):
                given += 1
                if self._pieces[given - 1]:
                    yield self._pieces[given - 1]
            if self.done:
                return
            self._batch.step()

    @property
    def done(self) -> bool:
        """Whether the text has ended."""
        return self.writer.finish_reason is not None

    @property
    def tokens(self) -> list[int]:
        """Token ids of the prompt and of what was written."""
        return self.ids + self.writer.token_ids

    def result(self) -> Generation:
        """Return the whole text, written to its end."""
        while not self.done:
            self._batch.step()
        return Generation(
            text="".join(self._pieces),
            token_ids=tuple(self.writer.token_ids),
            adapter=self._batch.adapter_of(self),
            finish_reason=self.writer.finish_reason or "length",
            prompt_tokens=len(self.ids),
            cached_tokens=self.cached_tokens,
            guessed_tokens=self.guessed_tokens,
        )

    def cancel(self) -> None:
        """End the text where it is; its row is free for the next request at the next step."""
        if not self.done:
            self._pieces.append(self.writer.cancel())

    def advance(self, logits: Array) -> None:
        """Choose a token from float32[vocab]."""
        self._pieces.append(self.writer.advance(logits))

    def guess(self) -> list[int]:
        """Return what may follow, to be looked at in the same step as the last token; empty without `lookup`."""
        return self._lookup.guess(self.tokens, self.writer.tokens_left - 1) if self._lookup is not None else []

    def learn(self, guessed: int, right: int) -> None:
        """Take in how many of the guessed tokens were right."""
        assert self._lookup is not None
        self._lookup.learn(guessed, right)
        self.guessed_tokens += right


class Batch:
    """Texts that are written together, each with its own adapter, options and seed; make it with `Session.batch`."""

    def __init__(self, session: Session, rows: int, max_length: int) -> None:
        self._session = session
        self._cache = session.shared_cache(rows, max_length)
        self._bindings = RowBindings(session, rows)
        self._prefixes = session.prefixes
        self._waiting: deque[Request] = deque()
        self._reading: tuple[Request, SharedCache] | None = None
        self._writing: list[Request] = []

    def submit(
        self,
        prompt: Prompt,
        *,
        adapter: str | Mapping[str, float] | EllipsisType | None = ...,
        **options: Unpack[Options],
    ) -> Request:
        """Take a request in; it joins at a following step, as soon as a row is free.

        Args:
            prompt: as for `Session.generate`.
            adapter: a name, a blend, or None for the bare base; left out, the session's active one. The text keeps it.
            **options: see `Options`.

        Raises:
            SessionError: for a wrong prompt, adapter or option, or a prompt that does not fit `max_length`.
        """
        chosen = sampling(options)
        ids = prompt_ids(self._session.text, prompt, chosen.chat)
        return self.take(ids, self._session.active.key_of(adapter), chosen)

    def take(self, ids: list[int], key: AdapterKey, options: Sampling) -> Request:
        """Take a request in; see `submit`, which makes a prompt and options what is wanted here."""
        spec = self._session.require_decoder()
        check_vocabulary(ids, spec)
        prefix = self._session.active.prefix(key)
        room = min(self._cache.max_length, max(0, self._cache.capacity - (0 if prefix is None else prefix.tokens)))
        limit = answer_limit(room, len(ids), options.max_new_tokens, what="batch")
        writer = Writer(self._session.text, options, spec.eos_token_ids, limit)
        request = Request(self, key, ids, options, writer)
        self._waiting.append(request)
        return request

    def step(self) -> bool:
        """Read what joins, write one token for every text; return whether there is anything left to do."""
        self._drop_cancelled()
        self._read()
        if self._writing:
            self._write()
        return bool(self._writing or self._reading or self._waiting)

    @property
    def writing(self) -> int:
        """How many texts are being written."""
        return len(self._writing)

    @property
    def obstacle(self) -> str | None:
        """Why rows of different adapters run one after the other instead of together, None where they do not."""
        return self._bindings.obstacle

    def adapter_of(self, request: Request) -> str | dict[str, float] | None:
        """Return a request's adapter as `Session.adapter` gives it."""
        return self._session.active.adapter_of(request.key)

    def _drop_cancelled(self) -> None:
        self._waiting = deque(request for request in self._waiting if not request.done)
        if self._reading is not None and self._reading[0].done:
            self._reading = None
        for row in reversed(range(len(self._writing))):
            if self._writing[row].done:
                self._leave(row)

    def _read(self) -> None:
        """Read prompts until enough was read for this step or no row is free."""
        left = _READ_PER_STEP
        while left > 0:
            if (run := self._next_run(left)) is not None:
                left -= self._read_together(*run)
            elif (reading := self._next()) is not None:
                left -= self._read_chunk(*reading)
            else:
                break

    def _read_chunk(self, request: Request, row: SharedCache) -> int:
        """Read a prompt's next chunk; return how many tokens that were."""
        first = int(row.lengths[0])
        chunk = request.ids[first : first + request.options.prefill_chunk]
        whole = first + len(chunk) == len(request.ids)
        logits = self._step(self._bindings.one(request.key), [chunk], row, wanted=whole)
        self._session.active.promoter.count(request.key, len(chunk))
        if whole:
            self._join(request, row)
            request.advance(logits[0, -1])
            if request.done:
                self._leave(len(self._writing) - 1)
        return len(chunk)

    def _next_run(self, room: int) -> tuple[list[Request], Binding] | None:
        """Return the next requests in line that can be read in one run, and the graph for their rows."""
        found = self._short(room)
        if len(found) > 1 and (binding := self._bindings.several([r.key for r in found], len(self._writing))):
            return found, binding
        alike = list(itertools.takewhile(lambda request: request.key == found[0].key, found))
        return (alike, self._bindings.one(alike[0].key)) if len(alike) > 1 else None

    def _short(self, room: int) -> list[Request]:
        """Return the next requests in line for which there are rows, with prompts of one chunk and of similar lengths.

        None if one is being read, or has a past or may have one: several tokens on top of a past are for one row only.
        """
        found: list[Request] = []
        if self._reading is not None or self._prefixes is not None:
            return found
        free, width = self._cache.batch_size - len(self._writing), 0
        for rows, request in enumerate(self._waiting, 1):
            length = len(request.ids)
            padding = rows * max(width, length) - (rows - 1) * width - length
            width = max(width, length)
            fits = rows <= free and rows * width <= room and (rows == 1 or padding <= _WORTH_A_RUN)
            alone = length > request.options.prefill_chunk or self._session.active.prefix(request.key) is not None
            if not fits or alone:
                break
            found.append(request)
        return found

    def _read_together(self, requests: list[Request], binding: Binding) -> int:
        """Read whole prompts in one run, padded on the right; return how many tokens that were."""
        first = len(self._writing)
        rows = self._cache.part(first, len(requests))
        lengths = np.asarray([len(request.ids) for request in requests])
        ids = np.zeros((len(requests), lengths.max()), np.int64)
        for row, request in enumerate(requests):
            rows.begin(row, None)
            ids[row, : lengths[row]] = request.ids
        logits = run_step(binding, self._session.require_decoder(), ids, rows, lengths=lengths, logits="last")
        for row, request in enumerate(requests):
            self._waiting.popleft()
            self._writing.append(request)
            self._session.active.promoter.count(request.key, len(request.ids))
            request.advance(logits[row, -1])
        for row in reversed(range(first, len(self._writing))):
            if self._writing[row].done:
                self._leave(row)
        return ids.size

    def _next(self) -> tuple[Request, SharedCache] | None:
        """Return the request that is being read and its row: the one that was, or else the next in line."""
        if self._reading is None and self._waiting and len(self._writing) < self._cache.batch_size:
            row = self._cache.part(len(self._writing), 1)
            request = self._waiting.popleft()
            row.begin(0, self._session.active.prefix(request.key))
            if self._prefixes is not None:
                request.content = self._session.active.content_of(request.key)
                request.promoted = self._session.active.is_promoted(request.key)
                request.cached_tokens = self._prefixes.restore(request.content, request.ids, row)
            self._reading = (request, row)
        return self._reading

    def _join(self, request: Request, row: SharedCache) -> None:
        """Have a request whose prompt is read be written, on the row behind the others."""
        target = self._cache.part(len(self._writing), 1)
        if row is not target:  # another text ended in the meantime
            target.take_row(0, row, 0)
        self._writing.append(request)
        self._reading = None
        self._remember(len(self._writing) - 1)  # texts that join later may begin like it

    def _write(self) -> None:
        if len(self._writing) == 1 and (guess := self._writing[0].guess()):
            self._write_several(guess)
        else:
            self._write_one_each()
        for row in reversed(range(len(self._writing))):
            if self._writing[row].done:
                self._leave(row)

    def _write_several(self, guess: list[int]) -> None:
        """Write as many tokens of the only text as were guessed right, and one more."""
        request, row = self._writing[0], self._cache.part(0, 1)
        past = int(row.lengths[0])
        ids = np.asarray([[request.writer.token_ids[-1], *guess]], np.int64)
        binding = self._bindings.one(request.key)
        logits = run_step(binding, self._session.require_decoder(), ids, row, logits="all")
        written = 0
        for expected in (*guess, None):
            request.advance(logits[0, written])
            written += 1
            if request.done or request.writer.token_ids[-1] != expected:
                break
        row.shorten(0, past + written)  # keys of wrong guesses are written over
        request.learn(len(guess), written - 1)
        self._session.active.promoter.count(request.key, written)

    def _write_one_each(self) -> None:
        ids = [[request.writer.token_ids[-1]] for request in self._writing]
        keys = [request.key for request in self._writing]
        front = self._cache.part(0, len(keys))
        binding = self._bindings.several(keys)
        if binding is not None:
            logits = self._step(binding, ids, front)
        else:
            each = [self._step(self._bindings.one(key), [ids[row]], front.part(row, 1)) for row, key in enumerate(keys)]
            logits = np.concatenate(each)
        for row, request in enumerate(self._writing):
            request.advance(logits[row, -1])
            self._session.active.promoter.count(request.key, 1)

    def _step(self, binding: Any, ids: list[list[int]], cache: SharedCache, *, wanted: bool = True) -> Array:
        spec = self._session.require_decoder()
        return run_step(binding, spec, np.asarray(ids, np.int64), cache, logits="last" if wanted else "none")

    def _leave(self, row: int) -> None:
        """Free a row: the last text takes it."""
        self._remember(row)
        last = len(self._writing) - 1
        if row != last:
            self._cache.copy_row(last, row)
            self._writing[row] = self._writing[last]
        self._writing.pop()

    def _remember(self, row: int) -> None:
        request = self._writing[row]
        # keys of which some were computed before a promotion and some after it are of no one content
        if self._prefixes is not None and request.promoted == self._session.active.is_promoted(request.key):
            self._prefixes.store(request.content, request.tokens, self._cache.part(row, 1))
