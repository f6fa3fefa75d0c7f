from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny_graphs as tiny

from edgeadapt.errors import SessionError
from edgeadapt.runtime import open_session

PER_TOKEN = 2 * 2 * 2 * 16 * 4  # layers, key and value, heads, dim, float32
TEXT = "a text of some length, long enough"
OPTIONS = {"max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture
def session(decoder):
    with open_session(decoder[0], threads=1, prefix_cache_bytes=10**7) as opened:
        yield opened


@pytest.fixture
def plain(decoder):
    with open_session(decoder[0], threads=1) as opened:
        yield opened


def _complete(session, text, adapter, **options):
    session.use(adapter)
    return session.complete(text, **OPTIONS | options)


def _same(found, expected):
    assert dataclasses.replace(found, cached_tokens=0) == expected


def test_it_is_off_unless_asked_for(plain):
    assert plain.prefixes is None
    assert [_complete(plain, TEXT, "a").cached_tokens for _ in range(2)] == [0, 0]


def test_one_text_with_adapter_a_then_b_then_a(session, plain):
    """The keys of a are reused for a, never for b, a blend or the base."""
    adapters = ["a", "b", "a", None, {"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.25}, None, "b"]
    known = len(TEXT) - 1
    cached = [0, 0, known, 0, 0, known, 0, known, known]
    for adapter, count in zip(adapters, cached, strict=True):
        found = _complete(session, TEXT, adapter)
        assert found.cached_tokens == count
        _same(found, _complete(plain, TEXT, adapter))


@pytest.mark.parametrize("chunk", [3, 512])
def test_logits_after_reused_keys_are_those_of_the_reference(decoder, session, chunk):
    _, shape, weights, adapters = decoder
    for text in (TEXT, TEXT[:20] + " and another end", TEXT + " that goes on", TEXT[:9]):
        batch = session.batch(1, 64)
        seen = []
        step = batch._step
        batch._step = lambda *a, step=step, seen=seen, **k: seen.append(step(*a, **k)) or seen[-1]
        request = batch.submit(text, adapter="a", max_new_tokens=4, ignore_eos=True, prefill_chunk=chunk)
        tokens = np.asarray(request.ids + list(request.result().token_ids))
        expected = tiny.decoder_reference(shape, weights, tokens, adapters["a"])[len(request.ids) - 1 : -1]
        found = np.concatenate([logits[0] for logits in seen if logits.size])
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        assert (request.cached_tokens > 0) == (text != TEXT)


def test_an_answer_is_part_of_what_the_next_prompt_may_begin_with(session, plain):
    first = _complete(session, TEXT, "a")
    ids = session.text.encode(TEXT) + list(first.token_ids)
    found = _complete(session, [*ids, 65, 66], "a")
    assert found.cached_tokens == len(ids) - 1  # the last new token was never read
    _same(found, _complete(plain, [*ids, 65, 66], "a"))


def test_another_content_under_the_same_name_shares_nothing(decoder, session, plain):
    sites = tiny.decoder_sites(decoder[1])
    for seed in (31, 32):
        tensors = tiny.low_rank(sites, 4, seed)
        for opened in (session, plain):
            opened.lend("lent", tensors)
        found = _complete(session, TEXT, "lent")
        assert found.cached_tokens == 0
        _same(found, _complete(plain, TEXT, "lent"))
        for opened in (session, plain):
            opened.use(None)
            opened.evict("lent")
    session.lend("other name", tensors)
    assert _complete(session, TEXT, "other name").cached_tokens == len(TEXT) - 1


def test_rows_of_a_batch_reuse_what_earlier_rows_read(session, plain):
    texts = [TEXT + end for end in (" one", " two", " three", "")]
    adapters = ["a", "a", "b", "a"]
    found = session.generate_batch(texts, adapters=adapters, **OPTIONS)
    assert [item.cached_tokens for item in found] == [0, len(TEXT) + 1, 0, len(TEXT) - 1]
    for item, expected in zip(found, plain.generate_batch(texts, adapters=adapters, **OPTIONS), strict=True):
        _same(item, expected)


def test_the_budget_holds_and_what_was_used_last_stays(decoder, plain):
    budget = 100 * PER_TOKEN + PER_TOKEN // 2
    with open_session(decoder[0], threads=1, prefix_cache_bytes=budget) as session:
        texts = [letter * 30 for letter in "xyz"]  # each leaves 37 tokens
        for text in (texts[0], texts[1], texts[0], texts[2]):
            _complete(session, text, "a")
            assert session.prefixes.size_bytes <= budget
        assert session.prefixes.size_bytes == 74 * PER_TOKEN
        cached = {text[0]: _complete(session, text, "a").cached_tokens for text in (texts[0], texts[2], texts[1])}
        assert cached == {"x": 29, "z": 29, "y": 0}
    with open_session(decoder[0], threads=1, prefix_cache_bytes=10 * PER_TOKEN) as session:
        for count in (0, 10):  # the beginning that fits
            found = _complete(session, TEXT, "a")
            assert found.cached_tokens == count
            _same(found, _complete(plain, TEXT, "a"))


@pytest.mark.parametrize("value", [-1, 1.5, True, "1 MB"])
def test_a_wrong_budget_is_refused(decoder, value):
    with pytest.raises(SessionError) as caught:
        open_session(decoder[0], prefix_cache_bytes=value)
    assert str(caught.value) == f"prefix_cache_bytes is {value!r}\nHint: give a whole number of bytes, 0 for no cache"
