"""Sessions whose texts begin with virtual tokens. What real tokens left in a cache makes a prefix with a known answer:

a text after it is the same as the text after those tokens.
"""

from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.errors import SessionError
from edgeadapt.runtime import open_session

BEFORE = {"p": [5, 200, 31], "q": [9], "r": [77, 78, 79, 80, 81, 82]}
OPTIONS = {"max_new_tokens": 6, "ignore_eos": True, "chat": False}
TEXTS = ["some text", "x", "another text of some length", "some text again", "yy"]


@pytest.fixture
def session(decoder):
    """A session with LoRA adapters a and b, and prefixes p, q, r that the base made of tokens."""
    with open_session(decoder[0], threads=1) as opened:
        _lend(opened)
        yield opened


def _lend(session):
    for name, tokens in BEFORE.items():
        cache = session.new_cache(1, 8)
        session.step([tokens], cache, logits="none")
        held = cache.read_row(0, len(tokens))
        session.lend(name, {f"prefix.{part}": value for part, value in held.items()})


def _ids(session, text):
    return session.text.encode(text)


def _after(session, name, ids):
    """Return the base's logits of `ids` after the tokens of a prefix."""
    session.use(None)
    before = BEFORE.get(name, [])
    return session.run({"input_ids": np.array([[*before, *ids]])})["logits"][:, len(before) :]


def _written(session, name, text):
    """Return what the base writes after the tokens of a prefix and a text; or an adapter of another kind."""
    session.use(None if name in BEFORE else name)
    return session.complete([*BEFORE.get(name, []), *_ids(session, text)], **OPTIONS).token_ids


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_a_text_after_a_prefix_is_the_text_after_its_tokens(session, chunk_size):
    rows = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]
    mask = np.array([[0] * (7 - len(row)) + [1] * len(row) for row in rows])  # padded on the left
    ids = np.array([[0] * (7 - len(row)) + row for row in rows])
    for name in ("p", "r", "q", "p"):
        session.use(name)
        assert (session.form, session.prefix_tokens) == ("plain", len(BEFORE[name]))
        logits = session.run({"input_ids": ids, "attention_mask": mask}, chunk_size=chunk_size)["logits"]
        for row, tokens in enumerate(rows):
            expected = _after(session, name, tokens)
            np.testing.assert_allclose(logits[row : row + 1, 7 - len(tokens) :], expected, rtol=0, atol=2e-5)


def test_a_swap_there_and_back_is_exact(session):
    inputs = {"input_ids": np.arange(1, 10)[None]}
    found = {}
    for name in ("p", "a", None, "q", "a", "p", None, "p", "q"):
        session.use(name)
        logits = session.run(inputs)["logits"].tobytes()
        assert found.setdefault(name, logits) == logits
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("cached", [0, 10**6])
def test_rows_begin_with_their_own_prefix(decoder, rows, cached):
    """More texts than rows, so that rows begin anew; with the cache of texts the second round reads less."""
    names = ["p", "a", "r", None, "q"]
    with open_session(decoder[0], threads=1, prefix_cache_bytes=cached) as session:
        _lend(session)
        expected = [_written(session, name, text) for name, text in zip(names, TEXTS, strict=True)]
        batch = session.batch(rows=rows, max_length=50)
        for again in range(2):
            requests = [
                batch.submit(text, adapter=name, **OPTIONS, prefill_chunk=4)
                for name, text in zip(names, TEXTS, strict=True)
            ]
            found = [request.result() for request in requests]
            assert [text.token_ids for text in found] == expected
            assert [text.prompt_tokens for text in found] == [len(_ids(session, text)) for text in TEXTS]
            if cached and again:
                assert [text.cached_tokens for text in found] == [len(_ids(session, text)) - 1 for text in TEXTS]


def test_guessed_tokens_and_a_prefix(session):
    for name in ("p", "r"):
        expected = _written(session, name, "abcabcabcabc")
        session.use(name)
        assert session.complete("abcabcabcabc", **OPTIONS, lookup=5).token_ids == expected


def test_prefixes_alone_open_no_slots_graph(decoder):
    with open_session(decoder[0], threads=1) as session:
        _lend(session)
        batch = session.batch(rows=3, max_length=20)
        for name in ("p", None, "q"):
            batch.submit("x", adapter=name, **OPTIONS)
        while batch.step():
            pass
        assert list(session.active.graphs) == [session.bundle.manifest.graphs["decoder"].plain]
        session.use({"p": 1.0, "a": 0.0})
        assert session.prefix_tokens == 3
        with pytest.raises(SessionError, match="the cache was filled with adapter 'p', active is 'q'"):
            _step_with_two(session)


def _step_with_two(session):
    session.use("p")
    cache = session.new_cache(1, 4)
    session.step([[1]], cache)
    session.use("q")
    session.step([[1]], cache)


def test_a_cache_takes_what_is_active_at_its_first_step(session):
    session.use("r")
    cache = session.new_cache(2, 5)
    session.use("p")
    logits = session.step([[1, 2], [3, 4]], cache, lengths=[2, 1], logits="last")
    assert cache.lengths.tolist() == [2, 1]
    assert cache.held.tolist() == [5, 4]
    for row, tokens in enumerate(([1, 2], [3])):
        expected = _after(session, "p", tokens)[0, -1]
        np.testing.assert_allclose(logits[row, -1], expected, rtol=0, atol=2e-5)


def test_room(session):
    """The user's tokens have the room that was asked for, and with the prefix as many as the model has positions."""
    session.use("r")
    cache = session.new_cache(1, 3)
    for token in (1, 2, 3):
        session.step([[token]], cache)
    with pytest.raises(SessionError) as caught:
        session.step([[4]], cache)
    assert str(caught.value) == (
        "row 0 of the cache holds 3 tokens and 1 more do not fit into max_length 3\n"
        "Hint: make a larger one with session.new_cache(batch_size, max_length), or shorten the input"
    )
    assert session.new_cache(1, 58).max_length == 58
    with pytest.raises(SessionError) as caught:
        session.new_cache(1, 59)
    assert str(caught.value) == (
        "max_length is 59, and with the virtual tokens of adapter 'r' this model holds 58\n"
        "Hint: give a whole number from 1 to 58"
    )
    session.use("q")
    cache = session.new_cache(1, 63)
    session.use("r")
    with pytest.raises(SessionError) as caught:
        session.step([[1] * 59], cache)
    assert str(caught.value) == (
        "row 0 of the cache holds 0 tokens and 59 more do not fit into 58, which are left beside 6 virtual tokens of "
        "its adapter\nHint: make a larger one with session.new_cache(batch_size, max_length), or shorten the input"
    )
    with pytest.raises(SessionError) as caught:
        session.run({"input_ids": np.ones((1, 59), np.int64)})
    assert str(caught.value) == (
        "input_ids has a row of 59 tokens; this model takes at most 58 beside its adapter's virtual tokens\n"
        "Hint: shorten the input"
    )
    with pytest.raises(SessionError) as caught:
        session.complete([1] * 58, **OPTIONS)
    assert str(caught.value) == (
        "the prompt has 58 tokens; this model holds at most 58 with its answer\nHint: shorten the prompt"
    )
    batch = session.batch(rows=1, max_length=64)
    with pytest.raises(SessionError, match="this batch holds at most 58 with its answer"):
        batch.submit([1] * 58, **OPTIONS)
    assert batch.submit([1] * 60, adapter=None, **OPTIONS).result().finish_reason == "length"


def test_an_adapter_that_came_after_the_cache(decoder):
    with open_session(decoder[0], threads=1) as session:
        cache = session.new_cache(1, 3)
        batch = session.batch(rows=1, max_length=3)
        _lend(session)
        session.use("r")
        with pytest.raises(SessionError) as caught:
            session.step([[1]], cache)
        assert str(caught.value) == (
            "the adapter begins with 6 virtual tokens, and the cache has room for 3\n"
            "Hint: make the cache after the adapter is known to the session, and a larger one"
        )
        with pytest.raises(SessionError, match="the prompt has 1 tokens; this batch holds at most 0 with its answer"):
            batch.submit([1], **OPTIONS)
        session.evict("p")
        with pytest.raises(SessionError, match="unknown adapter 'p'"):
            session.use("p")
