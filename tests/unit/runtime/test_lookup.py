from __future__ import annotations

import dataclasses

import pytest

from edgeadapt.runtime import open_session
from edgeadapt.runtime.lookup import Lookup

TEXTS = ["the cat sat on the mat and the cat sat on the", "abcabcabcabc", "hello", "nothing twice"]


@pytest.fixture
def session(decoder):
    with open_session(decoder[0], threads=1) as opened:
        yield opened


def _same(found, expected):
    assert dataclasses.replace(found, guessed_tokens=0, cached_tokens=0) == expected


@pytest.mark.parametrize("adapter", [None, "a", {"a": 0.5, "b": 0.5}])
@pytest.mark.parametrize("lookup", [1, 4, 16])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 3}, {"temperature": 0.3, "top_k": 5}])
def test_guesses_change_nothing(session, adapter, lookup, options):
    session.use(adapter)
    for text in TEXTS:
        options = {"max_new_tokens": 18, "ignore_eos": True, **options}
        _same(session.complete(text, lookup=lookup, **options), session.complete(text, **options))


class _Oracle(Lookup):
    """Guesses what the model will write, with a wrong token now and then."""

    answer: tuple[int, ...] = ()
    prompt = 0
    wrong_every = 5

    def guess(self, tokens, room):
        at = len(tokens) - self.prompt
        right = self.answer[at : at + min(4, room)]
        return [token if (at + i) % self.wrong_every else (token + 1) % 300 for i, token in enumerate(right)]


@pytest.mark.parametrize("wrong_every", [1, 2, 5, 1000])
@pytest.mark.parametrize("count", [2, 3, 17, 18, 20])
def test_right_and_wrong_guesses_give_the_same_text(session, monkeypatch, wrong_every, count):
    """Ends within a run of right guesses, and guesses up to the last token and no further."""
    monkeypatch.setattr("edgeadapt.runtime.batch.Lookup", _Oracle)
    session.use("a")
    expected = session.complete("hello", max_new_tokens=count, ignore_eos=True)
    monkeypatch.setattr(_Oracle, "answer", expected.token_ids)
    monkeypatch.setattr(_Oracle, "prompt", expected.prompt_tokens)
    monkeypatch.setattr(_Oracle, "wrong_every", wrong_every)
    batch = session.batch(1, expected.prompt_tokens + count)
    request = batch.submit("hello", max_new_tokens=count, ignore_eos=True, lookup=4)
    steps = 0
    while not request.done:
        batch.step()
        steps += 1
    found = request.result()
    _same(found, expected)
    assert 1 + steps + found.guessed_tokens == count  # the first step reads and writes a token, then writes on
    if wrong_every == 1:
        assert found.guessed_tokens == 0
    if wrong_every == 1000:
        assert found.guessed_tokens >= 0.7 * (count - 2)


def test_a_stop_text_within_the_guesses_ends_the_text(session, monkeypatch):
    monkeypatch.setattr("edgeadapt.runtime.batch.Lookup", _Oracle)
    whole = session.complete("hello", max_new_tokens=20, ignore_eos=True)
    monkeypatch.setattr(_Oracle, "answer", whole.token_ids)
    monkeypatch.setattr(_Oracle, "prompt", whole.prompt_tokens)
    for start in range(2, len(whole.text) - 1, 2):
        stop = whole.text[start : start + 2]
        options = {"max_new_tokens": 20, "ignore_eos": True, "stop": stop}
        _same(session.complete("hello", lookup=4, **options), session.complete("hello", **options))


def test_texts_that_are_written_together_do_not_guess_until_one_is_left(session):
    options = {"max_new_tokens": 20, "ignore_eos": True}
    batch = session.batch(2, 64)
    long = batch.submit(TEXTS[1], adapter="a", lookup=4, max_new_tokens=30, ignore_eos=True)
    short = batch.submit(TEXTS[0], adapter="b", lookup=4, max_new_tokens=5, ignore_eos=True)
    found = [long.result(), short.result()]
    session.use("a")
    _same(found[0], session.complete(TEXTS[1], max_new_tokens=30, ignore_eos=True))
    session.use("b")
    _same(found[1], session.complete(TEXTS[0], max_new_tokens=5, ignore_eos=True))
    with_cache = session.complete(TEXTS[0], lookup=4, **options)
    _same(with_cache, session.complete(TEXTS[0], **options))


def test_keys_after_guesses_are_fit_for_reuse(decoder, session):
    """Wrong guesses leave nothing behind in the prefix cache."""
    options = {"max_new_tokens": 20, "ignore_eos": True}
    with open_session(decoder[0], threads=1, prefix_cache_bytes=10**7) as caching:
        for opened in (caching, session):
            opened.use("a")
        first = caching.complete(TEXTS[1], lookup=8, **options)
        ids = caching.text.encode(TEXTS[1]) + list(first.token_ids)
        found = caching.complete([*ids, 70], lookup=8, **options)
        assert found.cached_tokens == len(ids) - 1
        _same(found, session.complete([*ids, 70], **options))


def test_guesses_follow_the_last_occurrence_of_the_longest_match():
    lookup = Lookup(8)
    tokens = [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]
    assert lookup.guess(tokens, 8) == [4, 9, 2]  # 1 2 3 was followed by 4, though 2 3 was last followed by 5
    assert lookup.guess([*tokens, 7, 2, 3], 2) == [7, 2]
    assert lookup.guess([*tokens, 7, 2, 3, 6], 8) == []
    assert lookup.guess([*tokens, 7, 2, 3], 0) == []


def test_guesses_grow_while_they_come_true():
    lookup = Lookup(8)
    tokens = [*range(50), 0, 1, 2]
    lengths = []
    for right in (3, 6, 8, 8, 2, 0, 1):
        guessed = len(lookup.guess(tokens, 100))
        lengths.append(guessed)
        lookup.learn(guessed, min(right, guessed))
    assert lengths == [3, 6, 8, 8, 8, 3, 1]
    assert len(Lookup(1).guess(tokens, 100)) == 1
