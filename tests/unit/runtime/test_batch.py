from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny_bundles
import tiny_graphs as tiny

from edgeadapt.errors import SessionError
from edgeadapt.runtime import open_session
from edgeadapt.runtime.rowwise import RowAdapters
from edgeadapt.runtime.step import run_step

PROMPTS = ["hello", "a much longer prompt than that", "x", "été 🙂", "hello", "again and again"]
ADAPTERS = ["a", "b", None, {"a": 0.7, "b": 0.3}, "a", None]


@pytest.fixture
def session(decoder):
    with open_session(decoder[0], threads=1) as opened:
        yield opened


def _alone(session, prompt, adapter, **options):
    session.use(adapter)
    return session.complete(prompt, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9}])
@pytest.mark.parametrize("chunk", [3, 512])
def test_rows_with_adapters_of_their_own_equal_their_texts_alone(session, options, chunk):
    options = {"max_new_tokens": 12, "ignore_eos": True, "prefill_chunk": chunk, **options}
    together = session.generate_batch(PROMPTS, adapters=ADAPTERS, seed=7, **options)
    pairs = enumerate(zip(PROMPTS, ADAPTERS, strict=True))
    assert together == [_alone(session, text, adapter, seed=7 + row, **options) for row, (text, adapter) in pairs]
    assert len({item.token_ids for item in together}) > 4


def _watch(batch):
    """Record the logits of every run of a batch's single-token steps, by the number of rows."""
    seen = []
    step = batch._step

    def watched(binding, ids, cache, *, wanted=True):
        logits = step(binding, ids, cache, wanted=wanted)
        if len(ids[0]) == 1:
            seen.append(logits)
        return logits

    batch._step = watched
    return seen


def test_logits_of_mixed_rows_equal_the_reference(decoder, session):
    """All ranks, blends and the base in one run; nothing is left to a lucky argmax."""
    _, shape, weights, adapters = decoder
    blend = {}
    for name in adapters["a"]:
        scale, axis = ((1, 1), 1) if name.endswith("lora_A") else ((0.7, 0.3), 0)
        blend[name] = np.concatenate([adapters[x][name] * s for x, s in zip("ab", scale, strict=True)], axis=axis)
    tensors = [adapters["a"], adapters["b"], {}, blend, adapters["a"], {}]
    batch = session.batch(len(PROMPTS), 64)
    seen = _watch(batch)
    pairs = zip(PROMPTS, ADAPTERS, strict=True)
    requests = [batch.submit(text, adapter=adapter, max_new_tokens=5, ignore_eos=True) for text, adapter in pairs]
    results = [request.result() for request in requests]
    together = [logits for logits in seen if len(logits) == len(PROMPTS)]
    assert len(together) == 4
    for row, (request, adapter) in enumerate(zip(requests, tensors, strict=True)):
        tokens = np.asarray(request.ids + list(results[row].token_ids))
        expected = tiny.decoder_reference(shape, weights, tokens, adapter)
        for place, logits in enumerate(together):
            wanted = expected[len(request.ids) + place]
            assert np.abs(logits[row, 0] - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_from_a_to_b_and_back_is_exact(session):
    """The bits of adapter a's rows do not depend on what their places in the stack held before."""
    found = {}
    for name in ("a", "b", "a again"):
        batch = session.batch(2, 64)
        seen = _watch(batch)
        for adapter in (None, name[0]):
            batch.submit("hello", adapter=adapter, max_new_tokens=6, ignore_eos=True)
        while batch.step():
            pass
        found[name] = np.stack([logits for logits in seen if len(logits) == 2])
    assert found["a"].tobytes() == found["a again"].tobytes() != found["b"].tobytes()
    batch = session.batch(2, 64)
    seen = _watch(batch)
    for name in ("a", "b", "a"):  # one batch, whose row 1 is written over
        batch.submit("hello", adapter=None, max_new_tokens=6, ignore_eos=True)
        request = batch.submit("hello", adapter=name, max_new_tokens=6, ignore_eos=True)
        request.result()
        while batch.step():
            pass
    first, _, third = np.split(np.stack([logits for logits in seen if len(logits) == 2]), 3)
    assert first.tobytes() == third.tobytes() == found["a"].tobytes()


def test_requests_join_and_leave_between_steps(session):
    """Twelve requests on three rows, submitted over time, with lengths, adapters, options and seeds of their own."""
    rng = np.random.default_rng(3)
    wanted = []
    for index in range(12):
        adapter = ADAPTERS[index % len(ADAPTERS)]
        options = {"max_new_tokens": int(rng.integers(1, 14)), "temperature": 0.9 * (index % 2), "seed": index}
        wanted.append((PROMPTS[int(rng.integers(len(PROMPTS)))], adapter, options | {"ignore_eos": True}))
    batch = session.batch(3, 64)
    requests, sizes = [], set()
    for prompt, adapter, options in wanted:
        requests.append(batch.submit(prompt, adapter=adapter, **options))
        batch.step()
        sizes.add(batch.writing)
    while batch.step():
        sizes.add(batch.writing)
    assert sizes == {1, 2, 3}
    assert all(request.done for request in requests)
    assert [request.result() for request in requests] == [_alone(session, p, a, **o) for p, a, o in wanted]


def test_a_long_prompt_does_not_stop_the_others(session, monkeypatch):
    monkeypatch.setattr("edgeadapt.runtime.batch._READ_PER_STEP", 4)
    batch = session.batch(2, 64)
    first = batch.submit("x", adapter="a", max_new_tokens=20, ignore_eos=True)
    batch.step()
    second = batch.submit(PROMPTS[1], adapter="b", max_new_tokens=4, ignore_eos=True, prefill_chunk=4)
    written = []
    while not second.writer.token_ids:
        batch.step()
        written.append(len(first.writer.token_ids))
    assert written == list(range(written[0], written[0] + 8))  # 30 tokens, 4 a step
    results = [first.result(), second.result()]
    assert results[0] == _alone(session, "x", "a", max_new_tokens=20, ignore_eos=True)
    assert results[1] == _alone(session, PROMPTS[1], "b", max_new_tokens=4, ignore_eos=True)


def test_a_row_is_free_while_a_prompt_is_read(session, monkeypatch):
    """The text before it ends meanwhile, so that the prompt's row moves."""
    monkeypatch.setattr("edgeadapt.runtime.batch._READ_PER_STEP", 4)
    batch = session.batch(3, 64)
    short = [batch.submit("hi", adapter=name, max_new_tokens=3, ignore_eos=True) for name in ("a", "b")]
    while batch.writing < 2:
        batch.step()
    late = batch.submit(PROMPTS[1], adapter="b", max_new_tokens=6, ignore_eos=True, prefill_chunk=4)
    assert late.result() == _alone(session, PROMPTS[1], "b", max_new_tokens=6, ignore_eos=True)
    assert all(request.done for request in short)


@pytest.fixture
def reads(monkeypatch):
    """The shapes of the token ids of all runs that read prompts of two or more tokens."""
    shapes = []

    def watched(binding, spec, ids, cache, **options):
        if np.shape(ids)[1] > 1:
            shapes.append(np.shape(ids))
        return run_step(binding, spec, ids, cache, **options)

    monkeypatch.setattr("edgeadapt.runtime.batch.run_step", watched)
    return shapes


OWN = ["a", "b", None, {"a": 0.7, "b": 0.3}, "b", "a"]


@pytest.mark.parametrize("adapters", [["a"] * 6, OWN, ["a", "b", "b", "b", None, None]])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_short_prompts_are_read_together(session, reads, count, adapters):
    """Whatever their adapters are; rows that end with their first token too; a long prompt or a full batch ends it."""
    texts = ["hello", "x", "a word", "été", "a much longer prompt than that", "last"]
    batch = session.batch(5, 64)
    new = [count, 1, count, count, count, 1]
    requests = [
        batch.submit(text, adapter=name, max_new_tokens=n, ignore_eos=True, prefill_chunk=12)
        for text, name, n in zip(texts, adapters, new, strict=True)
    ]
    found = [request.result() for request in requests]
    while batch.step():
        pass
    assert reads == [(4, 6), (1, 12), (1, 12), (1, 6), (1, 4)]
    alone = zip(texts, adapters, new, strict=True)
    assert found == [_alone(session, text, name, max_new_tokens=n, ignore_eos=True) for text, name, n in alone]


def test_logits_after_prompts_that_were_read_together_equal_the_reference(decoder, session, monkeypatch):
    """Prompts of 1 to 9 tokens, each with an adapter of its own: the first token's logits, not just the best one."""
    _, shape, weights, adapters = decoder
    seen = []

    def watched(*arguments, **options):
        seen.append(run_step(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr("edgeadapt.runtime.batch.run_step", watched)
    batch = session.batch(4, 64)
    pairs = [("été 🙂", "b"), ("x", None), ("hello", "a"), ("hello", "b")]
    requests = [batch.submit(text, adapter=name, max_new_tokens=1, ignore_eos=True) for text, name in pairs]
    assert not batch.step()
    (logits,) = seen
    for row, (request, (_, name)) in enumerate(zip(requests, pairs, strict=True)):
        expected = tiny.decoder_reference(shape, weights, np.asarray(request.ids), adapters.get(name, {}))[-1]
        assert np.abs(logits[row, -1] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_prompts_of_unlike_lengths_are_read_apart(session, reads):
    """Beside a long one, a short one would be padding above all: 24 tokens for 2."""
    texts = ["hi", "six tokens and twenty more", "this one has twenty tokens", "hi", "hi"]
    results = session.generate_batch(texts, adapters=OWN[:5], max_new_tokens=4, ignore_eos=True)
    assert reads == [(1, 2), (2, 26), (2, 2)]
    pairs = zip(texts, OWN, strict=False)
    assert results == [_alone(session, text, name, max_new_tokens=4, ignore_eos=True) for text, name in pairs]


def test_an_adapter_is_written_to_its_row_once(session, reads, monkeypatch):
    """Rows that join while others write are read on the rows on which they write on."""
    put, written = RowAdapters.put, []
    tensors_of, blended = session.active.adapter_tensors, []

    def watched(stack, row, key, tensors):
        written.append((row, key))
        put(stack, row, key, tensors)

    def asked(key):
        blended.extend([key] if len(key) > 1 else [])
        return tensors_of(key)

    monkeypatch.setattr(RowAdapters, "put", watched)
    monkeypatch.setattr(session.active, "adapter_tensors", asked)
    batch = session.batch(6, 64)
    requests = []
    for first in range(0, 6, 2):
        joining = OWN[first : first + 2]
        requests += [batch.submit("hello", adapter=name, max_new_tokens=9, ignore_eos=True) for name in joining]
        batch.step()
        batch.step()
    assert written == [(row, session.active.key_of(adapter)) for row, adapter in enumerate(OWN)]
    assert len(blended) == 1  # a blend is computed anew each time
    found = [request.result() for request in requests]
    assert reads == [(2, 5)] * 3
    assert found == [_alone(session, "hello", name, max_new_tokens=9, ignore_eos=True) for name in OWN]


def test_pieces_come_as_they_are_written(session):
    batch = session.batch(2, 64)
    one, other = (
        batch.submit("hello", adapter=name, max_new_tokens=20, temperature=1.0, ignore_eos=True) for name in "ab"
    )
    pieces = list(one)
    assert len(pieces) > 5
    assert "".join(pieces) == one.result().text
    assert list(other) == list(other)
    assert "".join(other) == other.result().text == _alone(
        session, "hello", "b", max_new_tokens=20, temperature=1.0, ignore_eos=True
    ).text  # fmt: skip


def test_a_cancelled_text_leaves_its_row(session):
    batch = session.batch(1, 64)
    first = batch.submit("hello", adapter="a", max_new_tokens=40, ignore_eos=True)
    waiting = batch.submit("hello", adapter="b", max_new_tokens=5, ignore_eos=True)
    dropped = batch.submit("hello", adapter="b", max_new_tokens=5, ignore_eos=True)
    for _ in range(4):
        batch.step()
    dropped.cancel()
    first.cancel()
    first.cancel()
    result = first.result()
    assert (result.finish_reason, len(result.token_ids)) == ("cancelled", 5)
    assert waiting.result() == _alone(session, "hello", "b", max_new_tokens=5, ignore_eos=True)
    assert dropped.result().token_ids == ()
    assert not batch.step()


def test_the_active_adapter_is_the_default_and_a_swap_changes_no_request(session):
    session.use("a")
    batch = session.batch(2, 64)
    request = batch.submit("hello", max_new_tokens=6, ignore_eos=True)
    session.use("b")
    assert request.result().adapter == "a"
    assert request.result() == _alone(session, "hello", "a", max_new_tokens=6, ignore_eos=True)


def test_a_graph_that_declares_shapes_runs_the_rows_one_after_the_other(decoder, tmp_path, reads):
    """Bundles that were exported before, tables, kernels and replaced parameters: right, if not faster."""
    adapters = ["b", "b", None, {"a": 0.7, "b": 0.3}, "a", "a"]
    tiny_bundles.write_decoder(tmp_path / "old.bundle", decoder[3], declare=True)
    with open_session(tmp_path / "old.bundle", threads=1) as session:
        batch = session.batch(6, 64)
        pairs = zip(["hello", "you", *PROMPTS[2:]], adapters, strict=True)
        requests = [batch.submit(text, adapter=adapter, max_new_tokens=6, ignore_eos=True) for text, adapter in pairs]
        found = [request.result() for request in requests]
        assert reads == [(2, 5), (1, 10), (2, 15)]  # those of one adapter are read together
        assert batch.obstacle == (
            "this bundle's graph takes one 'layers.0.down.lora_A' for all rows; another export may take more"
        )
        pairs = zip(["hello", "you", *PROMPTS[2:]], adapters, strict=True)
        assert found == [_alone(session, text, name, max_new_tokens=6, ignore_eos=True) for text, name in pairs]


@pytest.mark.parametrize("keep_graphs", [True, False])
def test_base_rows_need_no_second_graph(decoder, keep_graphs):
    with open_session(decoder[0], threads=1, keep_graphs=keep_graphs) as session:
        session.use("a")
        found = session.generate_batch(["hello"] * 3, adapters=["a", None, "b"], max_new_tokens=5, ignore_eos=True)
        assert list(session.active.graphs) == ["graph/decoder.slots.onnx"]
        assert session.adapter == "a"
        assert session.complete("hello", max_new_tokens=5, ignore_eos=True) == found[0]
        assert found[1] == _alone(session, "hello", None, max_new_tokens=5, ignore_eos=True)


def test_texts_that_end_at_once_leave_the_others_alone(session):
    found = session.generate_batch(PROMPTS, adapters=ADAPTERS, max_new_tokens=1, ignore_eos=True)
    assert [len(item.token_ids) for item in found] == [1] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "x", "adapter": "c"}, "unknown adapter 'c'\nHint: adapters in this bundle: a, b"),
        ({"prompt": ""}, "the prompt is empty\nHint: give at least one token"),
        ({"prompt": "x", "top_p": 2}, "top_p is 2\nHint: give above 0 and at most 1"),
        (
            {"prompt": "x" * 12},
            "the prompt has 12 tokens; this batch holds at most 12 with its answer\nHint: shorten the prompt",
        ),
    ],
)
def test_wrong_requests_are_refused_at_once(session, arguments, message):
    batch = session.batch(2, 12)
    with pytest.raises(SessionError) as caught:
        batch.submit(**arguments)
    assert str(caught.value) == message
    assert not batch.step()


@pytest.mark.parametrize("adapters", ["a", ["a"], {"a": 1.0}])
def test_adapters_must_be_one_per_prompt(session, adapters):
    with pytest.raises(SessionError) as caught:
        session.generate_batch(["x", "y"], adapters=adapters)
    assert str(caught.value) == (f"adapters is {adapters!r} for 2 prompts\nHint: give one adapter (or None) per prompt")


def test_run_with_an_adapter_per_row_equals_row_by_row(decoder, session):
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 256, (6, 7))
    session.use("b")
    found = session.run({"input_ids": ids}, adapters=ADAPTERS)["logits"]
    assert session.adapter == "b"
    for row, adapter in enumerate(ADAPTERS):
        session.use(adapter)
        expected = session.run({"input_ids": ids[row : row + 1]})["logits"][0]
        assert np.abs(found[row] - expected).max() <= 1e-5 * np.abs(expected).max()
    for one, other in itertools.combinations(found[[0, 1, 2, 3]], 2):
        assert np.abs(one - other).max() > 0.01


def test_run_takes_one_adapter_per_row(session):
    with pytest.raises(SessionError) as caught:
        session.run({"input_ids": [[1], [2]]}, adapters=["a"])
    assert str(caught.value) == (
        "adapters has 1 entries, input 'input_ids' is int64[2, 1]\n"
        "Hint: give one adapter (or None) per row of the inputs"
    )
    session.use("b")
    with pytest.raises(SessionError, match="unknown adapter 'c'"):
        session.run({"input_ids": [[1], [2]]}, adapters=["a", "c"])
    assert session.adapter == "b"
