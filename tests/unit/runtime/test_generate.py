from __future__ import annotations

import numpy as np
import pytest
import tiny_bundles
import tiny_graphs as tiny

from edgeadapt.errors import SessionError
from edgeadapt.runtime import open_session
from edgeadapt.runtime.sampling import Sampling, StopFinder, pick, sampling
from edgeadapt.runtime.tokenizer import Detokenizer, open_text_coder

PROMPTS = ["hello", "a much longer prompt than that", "x", "été 🙂"]


@pytest.fixture
def session(decoder):
    with open_session(decoder[0], threads=1) as opened:
        yield opened


def _greedy(decoder, prompt, adapter, count):
    """The reference's greedy tokens after a text of bytes."""
    _, shape, weights, adapters = decoder
    ids = tiny_bundles.byte_tokenizer().encode(prompt).ids
    new = []
    for _ in range(count):
        new.append(
            int(tiny.decoder_reference(shape, weights, np.asarray(ids + new), adapters.get(adapter))[-1].argmax())
        )
    return tuple(new)


@pytest.mark.parametrize("adapter", [None, "a", "b"])
@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_greedy_equals_the_reference(decoder, session, adapter, chunk):
    session.use(adapter)
    found = session.complete(PROMPTS[1], max_new_tokens=6, ignore_eos=True, prefill_chunk=chunk)
    assert found.token_ids == _greedy(decoder, PROMPTS[1], adapter, 6)
    assert found.adapter == adapter
    assert found.finish_reason == "length"
    assert found.prompt_tokens == len(PROMPTS[1])


@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9}])
@pytest.mark.parametrize("chunk", [3, 512])
def test_a_batch_equals_its_rows(session, adapter, options, chunk):
    session.use(adapter)
    together = session.generate_batch(PROMPTS, max_new_tokens=12, seed=7, prefill_chunk=chunk, **options)
    alone = [session.complete(text, max_new_tokens=12, seed=7 + row, **options) for row, text in enumerate(PROMPTS)]
    assert together == alone


def test_rows_that_stop_early_leave_the_others_alone(decoder, tmp_path):
    """The end token is chosen so that one row stops after three tokens and the others do not."""
    rows = [_greedy(decoder, text, None, 8) for text in PROMPTS]
    eos = next(t for i, t in enumerate(rows[1]) if i >= 2 and all(t not in r for j, r in enumerate(rows) if j != 1))
    tiny_bundles.write_decoder(tmp_path / "eos.bundle", {}, eos=(eos,))
    with open_session(tmp_path / "eos.bundle", threads=1) as session:
        found = session.generate_batch(PROMPTS, max_new_tokens=8)
        passed = session.complete(PROMPTS[1], max_new_tokens=8, ignore_eos=True)
    assert [item.finish_reason for item in found] == ["length", "stop", "length", "length"]
    assert found[1].token_ids == rows[1][: rows[1].index(eos)]
    assert [item.token_ids for item in found[2:]] == rows[2:]
    assert passed.token_ids == rows[1]


def test_streaming_gives_the_same_text_in_whole_characters(session):
    whole = session.complete("hello", max_new_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    pieces = list(session.generate("hello", max_new_tokens=40, temperature=1.0, seed=5, ignore_eos=True))
    assert len(pieces) > 5
    assert all(pieces)
    assert "".join(pieces) == whole.text == session.text.decode(whole.token_ids)


def test_seeds_matter_only_when_drawing(session):
    def tokens(**options):
        return session.complete("hello", max_new_tokens=10, ignore_eos=True, **options).token_ids

    assert tokens(temperature=1.0, seed=1) == tokens(temperature=1.0, seed=1) != tokens(temperature=1.0, seed=2)
    assert tokens(seed=1) == tokens(seed=2) == tokens(temperature=1.0, top_k=1, seed=3)


def test_the_answer_ends_where_the_model_does(session):
    found = session.complete("x" * 60, max_new_tokens=100, ignore_eos=True)
    assert (found.prompt_tokens, len(found.token_ids), found.finish_reason) == (60, 4, "length")
    with pytest.raises(SessionError) as caught:
        session.complete("x" * 64)
    assert str(caught.value) == (
        "the prompt has 64 tokens; this model holds at most 64 with its answer\nHint: shorten the prompt"
    )


def test_prompts_may_be_ids_or_text(session):
    ids = session.text.encode("hello")
    assert session.complete(ids, max_new_tokens=3) == session.complete("hello", max_new_tokens=3)
    assert session.complete(np.asarray(ids), max_new_tokens=3) == session.complete("hello", max_new_tokens=3)


def test_a_chat_template_wraps_a_text_unless_told_not_to(chat_decoder):
    with open_session(chat_decoder, threads=1) as session:
        messages = [{"role": "user", "content": "hi"}]
        wrapped = session.complete("hi", max_new_tokens=3)
        assert (
            wrapped
            == session.complete(messages, max_new_tokens=3)
            == session.complete("hi", max_new_tokens=3, chat=True)
        )
        ids = [tiny_bundles.USER, *b"hi\n", tiny_bundles.ASSISTANT]
        coder = session.text
        assert coder.encode_chat(messages) == [
            coder.tokenizer.token_to_id("<|user|>"),
            *coder.encode("hi\n"),
            coder.tokenizer.token_to_id("<|assistant|>"),
        ]
        assert wrapped.prompt_tokens == len(ids)
        assert session.complete("hi", max_new_tokens=3, chat=False).prompt_tokens == 2


def test_chat_without_a_template_is_refused(session):
    for call in (
        lambda: session.complete("x", chat=True),
        lambda: session.complete([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(SessionError) as caught:
            call()
        assert str(caught.value) == (
            "this bundle has no chat template, so it cannot take chat messages\nHint: give the prompt as plain text"
        )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty\nHint: give at least one token"),
        ([], "the prompt is empty\nHint: give at least one token"),
        (7, "a prompt is int\nHint: give a text, a list of token ids, or a list of chat messages"),
        ([1.5], "a prompt is list\nHint: give a text, a list of token ids, or a list of chat messages"),
        (
            [1, 300],
            (
                "the prompt holds the token id 300; the vocabulary has 300 tokens\n"
                "Hint: encode the text with the bundle's own tokenizer"
            ),
        ),
    ],
)
def test_wrong_prompts_are_refused_at_once(session, prompt, message):
    with pytest.raises(SessionError) as caught:
        session.generate(prompt)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0\nHint: give a whole number of 1 or more"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5\nHint: give a whole number of 1 or more"),
        ({"temperature": -0.1}, "temperature is -0.1\nHint: give 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan\nHint: give 0 or more"),
        ({"top_k": -1}, "top_k is -1\nHint: give a whole number of 0 or more"),
        ({"top_p": 0}, "top_p is 0\nHint: give above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1\nHint: give above 0 and at most 1"),
        ({"seed": -1}, "seed is -1\nHint: give a whole number of 0 or more"),
        ({"stop": [""]}, "stop is ['']\nHint: give texts that are not empty"),
        ({"stop": 7}, "stop is 7\nHint: give texts that are not empty"),
        ({"chat": "no"}, "chat is 'no'\nHint: give True, False or None"),
        ({"ignore_eos": 1}, "ignore_eos is 1\nHint: give True or False"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0\nHint: give a whole number of 1 or more"),
        ({"lookup": -1}, "lookup is -1\nHint: give a whole number of 0 or more"),
        (
            {"tokens": 5},
            (
                "unknown option 'tokens'\nHint: known: chat, ignore_eos, lookup, max_new_tokens, prefill_chunk, seed, "
                "stop, temperature, top_k, top_p"
            ),
        ),
    ],
)
def test_wrong_options_are_refused_at_once(session, option, message):
    with pytest.raises(SessionError) as caught:
        session.generate("x", **option)
    assert str(caught.value) == message


def test_options_and_their_type_agree():
    import dataclasses

    from edgeadapt.runtime.sampling import Options

    assert {field.name for field in dataclasses.fields(Sampling)} == set(Options.__annotations__)


def test_prompts_must_be_a_list(session):
    for prompts in ("hello", []):
        with pytest.raises(SessionError) as caught:
            session.generate_batch(prompts)
        assert str(caught.value) == (
            f"prompts is {prompts!r}\nHint: give a list of prompts; for one prompt use session.complete"
        )


def test_a_text_keeps_the_adapter_that_it_began_with(session):
    session.use("a")
    whole = session.complete("hello", max_new_tokens=30, ignore_eos=True)
    pieces = session.generate("hello", max_new_tokens=30, ignore_eos=True)
    first = next(pieces)
    session.use("b")
    other = session.complete("hello", max_new_tokens=30, ignore_eos=True)
    assert first + "".join(pieces) == whole.text != other.text


def test_stop_texts_are_cut_exactly_wherever_they_lie(session):
    """Every substring of the answer, used as a stop text, ends the answer right before its first occurrence."""
    whole = session.complete("hello", max_new_tokens=24, temperature=1.0, seed=5, ignore_eos=True).text
    assert len(whole) > 10
    for size in (1, 2, 3):
        for start in range(0, len(whole) - size, 3):
            stop = whole[start : start + size]
            pieces = list(
                session.generate("hello", max_new_tokens=24, temperature=1.0, seed=5, ignore_eos=True, stop=stop)
            )
            assert "".join(pieces) == whole[: whole.index(stop)], repr(stop)


def test_a_stop_text_ends_the_answer_with_reason_stop(session):
    whole = session.complete("hello", max_new_tokens=24, temperature=1.0, seed=5, ignore_eos=True)
    found = session.complete(
        "hello", max_new_tokens=24, temperature=1.0, seed=5, ignore_eos=True, stop=["never said", whole.text[4]]
    )
    assert found.finish_reason == "stop"
    assert found.text == whole.text[: whole.text.index(whole.text[4])]
    assert found.token_ids == whole.token_ids[: len(found.token_ids)]
    assert len(found.token_ids) < 24


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["ab", "c", "d"], ("bc",), ["a", "", ""]),
        (["ab", "x", "d"], ("bc",), ["a", "bx", "d"]),
        (["aaab"], ("aab",), ["a"]),
        (["a", "a", "a", "b", "c"], ("aab",), ["", "", "a", "", ""]),
        (["one", " END now"], ("STOP", "END"), ["one", " "]),
        (["xyz"], ("z", "xy"), [""]),
        (["abc"], (), ["abc"]),
    ],
)
def test_stop_finder(pieces, stop, expected):
    finder = StopFinder(stop)
    assert [finder.push(piece) for piece in pieces] == expected


def test_what_was_held_back_comes_at_the_end():
    finder = StopFinder(("END",))
    assert finder.push("the EN") == "the "
    assert finder.finish() == "EN"


def test_drawing_follows_the_probabilities():
    logits = np.log(np.asarray([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(0)

    def share(**options):
        drawn = [pick(logits, sampling({"temperature": 1.0, **options}), rng) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / len(drawn)

    np.testing.assert_allclose(share(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(share(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(top_p=0.6), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(top_p=0.5), [1, 0, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(top_p=1e-9), [1, 0, 0, 0])
    hot, cold = share(temperature=100.0), share(temperature=0.01)
    np.testing.assert_allclose(hot, 0.25, atol=0.03)
    np.testing.assert_allclose(cold, [1, 0, 0, 0])


def test_a_temperature_near_zero_does_not_overflow():
    logits = np.asarray([3.0, 1.0], np.float32)
    assert pick(logits, Sampling(temperature=1e-300), np.random.default_rng(0)) == 0


@pytest.mark.parametrize("text", ["plain", "Grüße", "日本語🙂🙃 ok", "a\u0301e", "\ufffd kept", "tail 🙂"])
def test_detokenizing_byte_by_byte_never_gives_half_a_character(decoder, text):
    with open_session(decoder[0], threads=1) as session:
        coder = open_text_coder(session.bundle)
    writer = Detokenizer(coder)
    pieces = [writer.push(token) for token in coder.encode(text)]
    assert "".join([*pieces, writer.finish()]) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
        assert [piece for piece in pieces if piece] == list(text)


def test_bytes_that_are_no_character_come_out_as_replacement(decoder):
    with open_session(decoder[0], threads=1) as session:
        coder = session.text
    smile = coder.encode("🙂")
    for tokens in (smile[:2], [*coder.encode("a"), *smile[:3]], [*smile[:2], *coder.encode("b")]):
        writer = Detokenizer(coder)
        text = "".join([*(writer.push(token) for token in tokens), writer.finish()])
        assert text == coder.decode(tokens)
        assert "\ufffd" in text


def test_random_tokens_detokenize_as_a_whole(decoder):
    with open_session(decoder[0], threads=1) as session:
        coder = session.text
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens = [int(token) for token in rng.integers(0, 261, 12)]
        writer = Detokenizer(coder)
        assert "".join([*(writer.push(token) for token in tokens), writer.finish()]) == coder.decode(tokens)


def test_sentencepiece_like_spaces_survive_streaming():
    """Its decoder drops the space before the first word of whatever it is given."""
    from tokenizers import Tokenizer, decoders, models

    from edgeadapt.runtime.tokenizer import TextCoder

    words = ["\u2581one", "\u2581two", "th", "ree", "\u2581"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="th"))
    tokenizer.decoder = decoders.Metaspace()
    writer = Detokenizer(TextCoder(tokenizer, None, {}, None, 0, ""))
    pieces = [writer.push(token) for token in (0, 1, 4, 2, 3, 1)]
    assert "".join([*pieces, writer.finish()]) == tokenizer.decode([0, 1, 4, 2, 3, 1])
