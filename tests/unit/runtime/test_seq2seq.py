from __future__ import annotations

import numpy as np
import pytest
import tiny_bundles

from edgeadapt.errors import SessionError
from edgeadapt.runtime import open_session

TEXTS = ["one", "a longer text", "x"]


@pytest.fixture
def session(seq2seq):
    with open_session(seq2seq[0], threads=1) as opened:
        yield opened


def test_run_equals_the_reference(seq2seq, session):
    rng = np.random.default_rng(0)
    ids, written = rng.integers(0, 256, (2, 5)), rng.integers(0, 256, (2, 4))
    mask = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    logits = session.run({"input_ids": ids, "attention_mask": mask, "decoder_input_ids": written})["logits"]
    for row, length in enumerate((5, 3)):
        expected = tiny_bundles.seq2seq_reference(seq2seq[0], ids[row, :length], written[row])
        np.testing.assert_allclose(logits[row], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("adapter", [None, "a"])
def test_steps_equal_one_run(session, adapter):
    rng = np.random.default_rng(0)
    encoder = {"input_ids": rng.integers(0, 256, (2, 5)), "attention_mask": np.ones((2, 5), np.int64)}
    written = rng.integers(0, 256, (2, 6))
    session.use(adapter)
    whole = session.run(encoder | {"decoder_input_ids": written})["logits"]
    cache = session.encode(encoder)
    parts = [session.step(written[:, a:b], cache) for a, b in ((0, 2), (2, 3), (3, 6))]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)
    cache = session.encode(encoder)
    assert session.step(written[:, :5], cache, logits="none").shape == (2, 0, 300)
    last = session.step(written[:, 5:], cache, logits="last")
    np.testing.assert_allclose(last, whole[:, 5:], rtol=0, atol=1e-5)


def test_an_adapter_acts_in_both_graphs(seq2seq, session):
    """With only the encoder's or only the decoder's half of the adapter the output is another one."""
    inputs = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]], "decoder_input_ids": [[3]]}
    found = {None: session.run(inputs)["logits"]}
    session.use("a")
    found["a"] = session.run(inputs)["logits"]
    for role in ("encoder", "decoder"):
        kept = session.active.bindings[role]
        other = session.active._bind({}, slots=False)[role]
        session.active.bindings[role] = other
        found[role] = session.run(inputs)["logits"]
        session.active.bindings[role] = kept
    outputs = list(found.values())
    assert all(np.abs(x - y).max() > 0.01 for i, x in enumerate(outputs) for y in outputs[:i])


def test_a_batch_equals_its_rows_and_the_reference(seq2seq, session):
    found = session.generate_batch(TEXTS, max_new_tokens=6, ignore_eos=True)
    assert found == [session.complete(text, max_new_tokens=6, ignore_eos=True) for text in TEXTS]
    ids = np.asarray(session.text.encode(TEXTS[0]))
    written = [tiny_bundles.PAD]
    for token in found[0].token_ids:
        logits = tiny_bundles.seq2seq_reference(seq2seq[0], ids, np.asarray(written))
        assert token == logits[-1].argmax()
        written.append(token)
    assert [item.prompt_tokens for item in found] == [len(text) for text in TEXTS]


def test_rows_that_end_early_leave_the_others_alone(session):
    """Rows are dropped from past, cross-attention and mask alike."""
    import dataclasses

    free = session.generate_batch(TEXTS, max_new_tokens=6, ignore_eos=True, temperature=2.0)
    tokens = [item.token_ids for item in free]
    eos = next(token for token in tokens[0][1:] if token not in tokens[1] + tokens[2])
    session.spec = dataclasses.replace(session.spec, eos_token_ids=(eos,))
    found = session.generate_batch(TEXTS, max_new_tokens=6, temperature=2.0)
    assert found[0].token_ids == tokens[0][: tokens[0].index(eos)]
    assert found[0].finish_reason == "stop"
    assert [item.token_ids for item in found[1:]] == tokens[1:]


def test_arrays_are_a_prompt_too(session):
    arrays = {"input_ids": [session.text.encode("one")], "attention_mask": [[1, 1, 1]]}
    found = session.complete(arrays, max_new_tokens=4)
    assert found.token_ids == session.complete("one", max_new_tokens=4).token_ids
    assert found.prompt_tokens == 0
    both = session.generate_batch([arrays, arrays], max_new_tokens=4)
    assert [item.token_ids for item in both] == [found.token_ids] * 2


def test_prompts_of_different_kinds_are_refused(session):
    with pytest.raises(SessionError) as caught:
        session.generate_batch(["one", {"input_ids": [[1]], "attention_mask": [[1]]}])
    assert str(caught.value) == ("prompts are of different kinds\nHint: give all as texts, or all as the same arrays")
    with pytest.raises(SessionError) as caught:
        session.complete({"input_ids": [[1], [1]], "attention_mask": [[1], [1]]})
    assert str(caught.value) == "the encoder's inputs have [2] rows for 1 prompts\nHint: give one row per prompt"


def test_what_a_seq2seq_model_cannot_do(session):
    with pytest.raises(SessionError) as caught:
        session.new_cache(1, 4)
    assert str(caught.value) == (
        "this model has an encoder; its cache starts with what the encoder says\nHint: use session.encode(inputs)"
    )
    with pytest.raises(SessionError) as caught:
        session.run({"input_ids": [[1]], "attention_mask": [[1]]})
    assert str(caught.value) == (
        "input 'decoder_input_ids' is missing\nHint: give it, or use session.generate to let the model write"
    )
    cache = session.encode({"input_ids": [[1], [1]], "attention_mask": [[1], [1]]})
    with pytest.raises(SessionError) as caught:
        session.step([[1, 2], [1, 2]], cache, lengths=[2, 1])
    assert str(caught.value) == (
        "this decoder's cache grows by whole columns, so rows of lengths [2, 1] cannot share a step\n"
        "Hint: give every row the same number of tokens in a step, or run the rows one by one"
    )


def test_the_encoder_counts_as_filling_the_cache(session):
    cache = session.encode({"input_ids": [[1]], "attention_mask": [[1]]})
    session.use("a")
    with pytest.raises(SessionError, match="the cache was filled with adapter none, active is 'a'"):
        session.step([[1]], cache)
