from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import tiny_graphs as tiny

from edgeadapt.bundle.bundle import open_bundle
from edgeadapt.errors import BundleError, SessionError
from edgeadapt.runtime import cache as cache_module
from edgeadapt.runtime import open_session

ROWS = [7, 3, 1, 5]


@pytest.fixture
def session(decoder):
    with open_session(decoder[0], threads=1) as opened:
        yield opened


def _tokens(lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, length) for length in lengths]


def _padded(rows, *, left=False):
    width = max(len(row) for row in rows)
    ids, mask = np.full((len(rows), width), 258), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def _reference(decoder, rows, adapter):
    _, shape, weights, adapters = decoder
    return [tiny.decoder_reference(shape, weights, row, adapters.get(adapter)) for row in rows]


def _close(measured: Any, expected: Any) -> None:
    np.testing.assert_allclose(measured, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("adapter", [None, "a", "b"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
def test_ragged_rows_equal_the_reference(decoder, session, adapter, left, chunk_size):
    rows = _tokens(ROWS)
    ids, mask = _padded(rows, left=left)
    session.use(adapter)
    logits = session.run({"input_ids": ids, "attention_mask": mask}, chunk_size=chunk_size)["logits"]
    assert logits.shape == (4, 7, 300)
    for index, expected in enumerate(_reference(decoder, rows, adapter)):
        _close(logits[index][mask[index] == 1], expected)
        assert not logits[index][mask[index] == 0].any()


def test_adapters_change_the_output(decoder, session):
    ids = _padded(_tokens([6]))[0]
    outputs = {}
    for name in (None, "a", "b"):
        session.use(name)
        outputs[name] = session.run({"input_ids": ids})["logits"]
    for left, right in itertools.combinations(outputs.values(), 2):
        assert np.abs(left - right).max() > 0.1


def test_swapping_there_and_back_is_bit_identical(decoder, session):
    ids = _padded(_tokens([6]))[0]
    found = []
    for name in (None, "a", "b", "a", None, {"a": 0.5, "b": 0.5}, "a", None):
        session.use(name)
        found.append(session.run({"input_ids": ids})["logits"])
    base, a, _, a_again, base_again, _, a_third, base_third = found
    for one, other in ((a, a_again), (a, a_third), (base, base_again), (base, base_third)):
        assert one.tobytes() == other.tobytes()


def test_the_slots_graph_without_an_adapter_is_the_base(decoder, session):
    ids = _padded(_tokens([6]))[0]
    base = session.run({"input_ids": ids})["logits"]
    session.use({"a": 0.0})
    _close(session.run({"input_ids": ids})["logits"], base)


def test_graphs_are_opened_once_and_only_when_needed(decoder, session):
    assert not session.active.graphs
    session.prepare()
    assert list(session.active.graphs) == ["graph/decoder.plain.onnx"]
    session.use("a")
    opened = dict(session.active.graphs)
    assert list(opened) == ["graph/decoder.plain.onnx", "graph/decoder.slots.onnx"]
    session.use("b")
    session.use(None)
    assert all(session.active.graphs[name] is graph for name, graph in opened.items())


def test_a_blend_is_the_weighted_sum_of_low_rank_terms(decoder, session):
    _, shape, weights, adapters = decoder
    row = _tokens([6])[0]
    session.use({"a": 0.7, "b": 0.3})
    mixed = {}
    for name in adapters["a"]:
        _site, term = name.rsplit(".", 1)
        scale = [(0.7, 0.3), (1, 1)][term == "lora_A"]
        pair = [adapters[x][name] * s for x, s in zip("ab", scale, strict=True)]
        mixed[name] = np.concatenate(pair, axis=1 if term == "lora_A" else 0)
    _close(session.run({"input_ids": row[None]})["logits"][0], tiny.decoder_reference(shape, weights, row, mixed))
    assert session.adapter == {"a": 0.7, "b": 0.3}


@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("widths", [[1] * 9, [9], [4, 1, 1, 3], [3, 6]])
def test_steps_equal_the_reference(decoder, session, adapter, widths):
    rows = _tokens([9, 9])
    ids = np.stack(rows)
    expected = np.stack(_reference(decoder, rows, adapter))
    session.use(adapter)
    cache = session.new_cache(2, 9)
    first = 0
    for width in widths:
        part = slice(first, first + width)
        _close(session.step(ids[:, part], cache), expected[:, part])
        first += width
    assert cache.lengths.tolist() == [9, 9]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_ragged_steps_with_rows_that_have_ended(decoder, session, chunk):
    """A row without tokens in a step keeps its state, whatever its padding left in the cache."""
    rows = _tokens([length + 2 for length in ROWS])
    expected = _reference(decoder, rows, "a")
    session.use("a")
    cache = session.new_cache(4, 9)
    for first in range(0, max(ROWS), chunk):
        counts = np.clip(np.asarray(ROWS) - first, 0, chunk)
        ids = np.full((4, chunk), 258)
        for row, count in enumerate(counts):
            ids[row, :count] = rows[row][first : first + count]
        found = session.step(ids, cache, lengths=counts)
        assert found.shape == (4, chunk, 300)
        for row, count in enumerate(counts):
            _close(found[row, :count], expected[row][first : first + count])
            assert not found[row, count:].any()
    assert cache.lengths.tolist() == ROWS
    for extra in range(2):
        ids = np.asarray([[row[length + extra]] for row, length in zip(rows, ROWS, strict=True)])
        found = session.step(ids, cache)
        for row, length in enumerate(ROWS):
            _close(found[row, 0], expected[row][length + extra])


@pytest.mark.parametrize("past", [0, 2])
def test_logits_of_the_last_position_or_none(decoder, session, past):
    rows = _tokens([length + past for length in ROWS])
    expected = _reference(decoder, rows, None)
    ids, _ = _padded([row[past:] for row in rows])
    cache = session.new_cache(4, 9)
    if past:
        none = session.step(np.stack([row[:past] for row in rows]), cache, logits="none")
        assert none.shape == (4, 0, 300)
    found = session.step(ids, cache, lengths=ROWS, logits="last")
    assert found.shape == (4, 1, 300)
    for row, length in enumerate(ROWS):
        _close(found[row, 0], expected[row][past + length - 1])
    assert cache.lengths.tolist() == [length + past for length in ROWS]


def test_a_full_row_can_wait_while_another_goes_on(decoder, session):
    """One more token for row 1 needs a padded token for row 0, for which its buffer has no room."""
    rows = _tokens([9, 9])
    cache = session.new_cache(2, 9)
    ids, _ = _padded([rows[0], rows[1][:7]])
    session.step(ids, cache, lengths=[9, 7], logits="none")
    found = session.step([[0], [rows[1][7]]], cache, lengths=[0, 1])
    _close(found[1, 0], _reference(decoder, rows, None)[1][7])
    assert cache.lengths.tolist() == [9, 8]


def test_dropping_rows_keeps_the_others(decoder, session):
    rows = _tokens([4, 4, 4])
    cache = session.new_cache(3, 6)
    session.step(np.stack([row[:3] for row in rows]), cache)
    cache.keep([2, 0])
    found = session.step([[rows[2][3]], [rows[0][3]]], cache)
    expected = _reference(decoder, rows, None)
    _close(found[0, 0], expected[2][3])
    _close(found[1, 0], expected[0][3])


def test_caches_do_not_share_memory(decoder, session):
    rows = _tokens([5, 5])
    expected = _reference(decoder, rows, None)
    caches = [session.new_cache(1, 5) for _ in rows]
    for position in range(5):
        for row, cache, wanted in zip(rows, caches, expected, strict=True):
            _close(session.step(row[None, position : position + 1], cache)[0, 0], wanted[position])


def test_outputs_stay_what_they_were(decoder, session):
    """Each run's outputs lie in memory of their own, also after later runs and after the session is gone."""
    ids = np.stack(_tokens([4, 4]))
    first = session.run({"input_ids": ids})["logits"]
    copy = first.copy()
    session.run({"input_ids": ids[::-1]})
    session.use("a")
    session.run({"input_ids": ids})
    session.close()
    assert first.tobytes() == copy.tobytes()


def test_a_cache_belongs_to_the_adapter_that_filled_it(decoder, session):
    session.use("a")
    cache = session.new_cache(1, 8)
    session.step([[1, 2]], cache)
    session.use("b")
    with pytest.raises(SessionError) as caught:
        session.step([[3]], cache)
    assert str(caught.value) == (
        "the cache was filled with adapter 'a', active is 'b': keys and values of one adapter mean nothing to another\n"
        "Hint: make a new cache with session.new_cache after session.use, and feed the tokens again"
    )
    session.use({"a": 0.5, "b": 0.5})
    with pytest.raises(SessionError, match=r"filled with adapter .a., active is 0\.5\*a\+0\.5\*b"):
        session.step([[3]], cache)
    session.use(None)
    with pytest.raises(SessionError, match="filled with adapter 'a', active is none"):
        session.step([[3]], cache)
    session.use("a")
    session.step([[3]], cache)
    assert cache.lengths.tolist() == [3]


def test_a_cache_that_is_full_refuses_and_stays_as_it_was(decoder, session):
    cache = session.new_cache(2, 5)
    session.step([[1, 2, 3, 4], [1, 2, 3, 4]], cache)
    with pytest.raises(SessionError) as caught:
        session.step([[5, 6], [5, 6]], cache)
    assert str(caught.value) == (
        "row 0 of the cache holds 4 tokens and 2 more do not fit into max_length 5\n"
        "Hint: make a larger one with session.new_cache(batch_size, max_length), or shorten the input"
    )
    assert cache.lengths.tolist() == [4, 4]
    session.step([[5], [5]], cache)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4), "batch_size is 0\nHint: give a whole number of 1 or more"),
        ((True, 4), "batch_size is True\nHint: give a whole number of 1 or more"),
        ((1, 65), "max_length is 65\nHint: give a whole number from 1 to 64"),
        ((1, 0), "max_length is 0\nHint: give a whole number from 1 to 64"),
    ],
)
def test_cache_sizes_are_checked(session, sizes, message):
    with pytest.raises(SessionError) as caught:
        session.new_cache(*sizes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"input_ids": [1, 2]},
            (
                "input_ids is int64[2], expected int64[batch, seq] with at least one token\n"
                "Hint: give token ids as a two-dimensional array of whole numbers, one row per sequence"
            ),
        ),
        (
            {"input_ids": [[1.5]]},
            (
                "input_ids is float64[1, 1], expected int64[batch, seq] with at least one token\n"
                "Hint: give token ids as a two-dimensional array of whole numbers, one row per sequence"
            ),
        ),
        (
            {"input_ids": [[300], [1]]},
            (
                "input_ids holds the token id 300; the vocabulary has 300 tokens\n"
                "Hint: encode the text with the bundle's own tokenizer"
            ),
        ),
        (
            {"input_ids": [[-1], [1]]},
            (
                "input_ids holds the token id -1; the vocabulary has 300 tokens\n"
                "Hint: encode the text with the bundle's own tokenizer"
            ),
        ),
        (
            {"input_ids": [[1]]},
            (
                "input_ids has 1 rows, the cache has 2\n"
                "Hint: make a cache for this batch with session.new_cache(batch_size, max_length)"
            ),
        ),
        (
            {"input_ids": [[1, 2], [1, 2]], "lengths": [2, 0], "logits": "last"},
            (
                "lengths is [2, 0], expected one whole number from 1 to 2 for each of 2 rows\n"
                "Hint: lengths says how many tokens of each right-padded row are real"
            ),
        ),
        (
            {"input_ids": [[1, 2], [1, 2]], "lengths": [3, 1]},
            (
                "lengths is [3, 1], expected one whole number from 0 to 2 for each of 2 rows\n"
                "Hint: lengths says how many tokens of each right-padded row are real"
            ),
        ),
        ({"input_ids": [[1], [1]], "logits": "some"}, 'logits is \'some\'\nHint: give "all", "last" or "none"'),
    ],
)
def test_wrong_steps_are_refused(session, arguments, message):
    cache = session.new_cache(2, 8)
    with pytest.raises(SessionError) as caught:
        session.step(cache=cache, **arguments)
    assert str(caught.value) == message
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"ids": [[1]]},
            (
                "unknown input 'ids'\n"
                "Hint: a decoder takes input_ids int64[batch, seq] and optionally attention_mask int64[batch, seq]"
            ),
        ),
        (
            {"attention_mask": [[1]]},
            (
                "input 'input_ids' is missing\n"
                "Hint: a decoder takes input_ids int64[batch, seq] and optionally attention_mask int64[batch, seq]"
            ),
        ),
        (
            {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]},
            (
                "attention_mask row 0 is [1, 0, 1]\n"
                "Hint: attention_mask holds 1 for tokens and 0 for padding, which is left or right of a row's tokens"
            ),
        ),
        (
            {"input_ids": [[1, 2], [1, 2]], "attention_mask": [[1, 1], [0, 0]]},
            (
                "attention_mask row 1 is [0, 0]\n"
                "Hint: attention_mask holds 1 for tokens and 0 for padding, which is left or right of a row's tokens"
            ),
        ),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            (
                "attention_mask is int64[1, 1], expected zeros and ones of shape [1, 2] like input_ids\n"
                "Hint: attention_mask holds 1 for tokens and 0 for padding, which is left or right of a row's tokens"
            ),
        ),
        (
            {"input_ids": [[1] * 65]},
            "input_ids has a row of 65 tokens; this model takes at most 64\nHint: shorten the input",
        ),
    ],
)
def test_wrong_decoder_inputs_are_refused(session, inputs, message):
    with pytest.raises(SessionError) as caught:
        session.run(inputs)
    assert str(caught.value) == message


def test_a_wrong_chunk_size_is_refused(session):
    with pytest.raises(SessionError) as caught:
        session.run({"input_ids": [[1]]}, chunk_size=0)
    assert str(caught.value) == "chunk_size is 0\nHint: give a whole number of 1 or more, or leave it out"


def test_padding_may_be_on_both_sides(decoder, session):
    row = _tokens([3])[0]
    found = session.run({"input_ids": [[9, *row, 9]], "attention_mask": [[0, 1, 1, 1, 0]]})["logits"]
    _close(found[0, 1:4], _reference(decoder, [row], None)[0])


def test_the_longest_sequence_fits(decoder, session):
    row = _tokens([64])[0]
    _close(session.run({"input_ids": row[None]}, chunk_size=60)["logits"][0], _reference(decoder, [row], None)[0])


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("c", "unknown adapter 'c'\nHint: adapters in this bundle: a, b"),
        ({"a": 0.5, "c": 0.5}, "unknown adapter 'c'\nHint: adapters in this bundle: a, b"),
        ({"a": float("nan")}, "the weight of adapter 'a' is nan\nHint: give a finite number such as 0.7"),
        ({"a": "0.5"}, "the weight of adapter 'a' is '0.5'\nHint: give a finite number such as 0.7"),
        (
            {},
            "adapter is {}\nHint: give a name, weights by name ({'a': 0.7, 'b': 0.3}), or None for the base",
        ),
        (
            7,
            "adapter is 7\nHint: give a name, weights by name ({'a': 0.7, 'b': 0.3}), or None for the base",
        ),
    ],
)
def test_a_wrong_choice_leaves_the_active_adapter(session, adapter, message):
    session.use("b")
    with pytest.raises(SessionError) as caught:
        session.use(adapter)
    assert str(caught.value) == message
    assert session.adapter == "b"


def test_a_damaged_adapter_leaves_the_active_one(decoder, tmp_path):
    import shutil

    path = shutil.copytree(decoder[0], tmp_path / "copy.bundle")
    file = path / "adapters" / "a" / "adapter.onnx_adapter"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with open_session(path, threads=1) as session:
        session.use("b")
        before = session.run({"input_ids": [[1, 2]]})["logits"]
        with pytest.raises(BundleError, match=r"adapter\.onnx_adapter is damaged"):
            session.use("a")
        assert session.adapter == "b"
        assert session.run({"input_ids": [[1, 2]]})["logits"].tobytes() == before.tobytes()


def test_evicting_reads_the_file_again(decoder, session):
    session.use("a")
    with pytest.raises(SessionError) as caught:
        session.evict("a")
    assert str(caught.value) == "adapter 'a' is active\nHint: session.use(None) first"
    resident = session.active.residents._ready["a"]
    session.use(None)
    session.evict("a")
    session.use("a")
    assert session.active.residents._ready["a"] is not resident


def test_a_swap_leaves_nothing_of_the_adapter_before(decoder):
    """Also where the next one sets fewer inputs: what is bound cannot be unbound."""
    whole = open_bundle(decoder[0]).adapter_tensors("a")
    few = dict(list(whole.items())[:2])
    ids = {"input_ids": [[1, 2, 3]]}
    expected = {}
    for name, tensors in (("whole", whole), ("few", few)):
        with open_session(decoder[0], threads=1) as fresh:
            fresh.lend(name, tensors)
            fresh.use(name)
            expected[name] = fresh.run(ids)["logits"]
    with open_session(decoder[0], threads=1) as session:
        session.lend("whole", whole)
        session.lend("few", few)
        for name in ("whole", "few", "whole", "b", "few", "b", "whole"):
            session.use(name)
            if name in expected:
                np.testing.assert_array_equal(session.run(ids)["logits"], expected[name])


def test_a_swap_back_finds_the_binding_that_waited(decoder, session):
    prompt = [[3, 1, 4, 1, 5]]
    found = {}
    for adapter in ("a", None, "b"):
        session.use(adapter)
        found[adapter] = session.active.binding("decoder"), session.run({"input_ids": prompt})["logits"]
    for adapter in ("a", "b", None, "a"):
        session.use(adapter)
        assert session.active.binding("decoder") is found[adapter][0]
        assert np.array_equal(session.run({"input_ids": prompt})["logits"], found[adapter][1])


def test_a_binding_that_waits_holds_no_cache(session):
    session.use("a")
    cache = session.new_cache(1, 8)
    session.step([[3, 1, 4]], cache)
    buffer = weakref.ref(next(iter(cache.buffers.values())))
    session.use("b")
    del cache
    gc.collect()
    assert buffer() is None


def test_a_binding_that_waited_does_not_run_with_what_is_gone(session):
    session.use("a")
    session.run({"input_ids": [[3, 1, 4]]})
    session.use("b")
    session.use("a")
    with pytest.raises(AssertionError, match="past_key_values"):
        session.active.binding("decoder").run()


def test_what_waits_is_dropped_with_its_adapter(decoder, session):
    tensors = {name: tensor.numpy() * 2 for name, tensor in session.active.residents.tensors((("a", 1.0),)).items()}
    session.use("a")
    first = session.active.binding("decoder")
    session.use(None)
    session.evict("a")
    session.use("a")
    assert session.active.binding("decoder") is not first
    before = session.run({"input_ids": [[3, 1, 4]]})["logits"]
    session.use("b")
    session.lend("a", tensors)
    session.use("a")
    assert not np.array_equal(session.run({"input_ids": [[3, 1, 4]]})["logits"], before)


def test_a_closed_session_says_so(decoder):
    session = open_session(decoder[0], threads=1)
    session.close()
    for call in (lambda: session.use("a"), lambda: session.run({"input_ids": [[1]]}), lambda: session.generate("x")):
        with pytest.raises(SessionError) as caught:
            call()
        assert str(caught.value) == "the session is closed\nHint: open a new one with open_session"


def test_a_decoder_has_no_encoder(session):
    with pytest.raises(SessionError) as caught:
        session.encode({"input_ids": [[1]]})
    assert str(caught.value) == "this model has no encoder\nHint: use session.new_cache(batch_size, max_length)"


def test_a_merged_bundle_takes_its_own_name_only(tmp_path):
    import tiny_bundles

    path = tmp_path / "merged.bundle"
    tiny_bundles.write_decoder(path, {}, merged="support")
    with open_session(path, threads=1) as session:
        assert session.adapter == "support"
        session.use(None)
        session.use("support")
        session.run({"input_ids": [[1]]})
        with pytest.raises(SessionError) as caught:
            session.use("sales")
    assert str(caught.value) == (
        "adapter 'sales' cannot be used: 'support' is merged into the weights of this bundle\n"
        "Hint: export without --merge to swap adapters"
    )


def test_a_bundle_without_adapters_says_so(chat_decoder):
    with open_session(chat_decoder, threads=1) as session, pytest.raises(SessionError) as caught:
        session.use("a")
    assert str(caught.value) == "unknown adapter 'a'\nHint: this bundle holds no adapter: edgeadapt add"


@pytest.mark.parametrize("adapter", [None, "a"])
def test_steps_of_one_token_give_the_bits_of_the_general_way(session, adapter, monkeypatch):
    """`lengths` leads past the short cut; the mask is bound anew every few tokens, and tokens are forgotten between."""
    monkeypatch.setattr(cache_module, "_MASK_COLUMNS", 3)
    session.use(adapter)
    ids = _tokens([20])[0]
    caches = [session.new_cache(1, 24), session.new_cache(1, 24), session.new_cache(2, 24).part(1, 1)]
    for index, token in enumerate(ids):
        found = [
            session.step([[token]], caches[0]),
            session.step(np.array([[token]], np.int32), caches[2], logits="last"),
        ]
        expected = session.step([[token]], caches[1], lengths=[1])
        assert all(np.array_equal(one, expected) for one in found)
        for cache in caches:
            cache.shorten(0, {4: 2, 11: 5}.get(index, index + 1))
    kept = found[0].copy()
    session.step([[3]], caches[0])
    assert np.array_equal(found[0], kept), "an answer changed when the next one came"
    assert [cache.lengths.tolist() for cache in caches] == [[14], [13], [13]]
    assert session.step([[3]], caches[0], logits="none").shape == (1, 0, 300)


def test_a_full_cache_and_wrong_tokens_are_refused_in_steps_of_one_token(session):
    cache = session.new_cache(1, 2)
    for _ in range(2):
        session.step([[1]], cache)
    with pytest.raises(SessionError, match="row 0 of the cache holds 2 tokens and 1 more do not fit"):
        session.step([[1]], cache)
    with pytest.raises(SessionError, match="holds the token id -1"):
        session.step([[-1]], session.new_cache(1, 2))
    with pytest.raises(SessionError, match="holds the token id 300"):
        session.step([[300]], session.new_cache(1, 2))
