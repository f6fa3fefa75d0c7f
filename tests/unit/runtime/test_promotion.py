"""Promotion: slots serve until the patched weights are ready, then those, with the same answers; failures are told."""

from __future__ import annotations

import hashlib
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeadapt.bundle import Change, PatchWriter, open_bundle, write_manifest, write_patch
from edgeadapt.errors import BundleError, SessionError
from edgeadapt.runtime import open_session, promotion
from edgeadapt.runtime.promotion import Promoter, Promotion

IDS = {"input_ids": np.array([[5, 9, 2, 7]])}
WEIGHTS = "graph/weights.bin"


def add_patches(path: Path, adapters: dict[str, dict[str, Any]]) -> None:
    """Give adapters of a float bundle the patches that put them into its weights."""
    bundle = open_bundle(path)
    record = bundle.manifest.files[WEIGHTS]
    before = np.fromfile(path / WEIGHTS, np.uint8)
    places = {}
    for graph in bundle.manifest.graphs.values():
        model = onnx.load(str(path / graph.plain), load_external_data=False)
        for tensor in model.graph.initializer:
            where = {item.key: item.value for item in tensor.external_data}
            if where:
                places[tensor.name] = int(where["offset"]), tuple(tensor.dims)
    for name, tensors in adapters.items():
        after = before.copy()
        changes = []
        for site in sorted({key.rpartition(".")[0] for key in tensors}, key=lambda site: places[f"{site}.weight_t"][0]):
            offset, shape = places[f"{site}.weight_t"]
            part = slice(offset, offset + 4 * int(np.prod(shape)))
            weight = before[part].view(np.float32).reshape(shape)
            merged = weight + tensors[f"{site}.lora_A"] @ tensors[f"{site}.lora_B"]
            after[part] = merged.astype(np.float32).view(np.uint8).reshape(-1)
            changes.append(Change(offset, 0, before[part], after[part]))
        writer = PatchWriter()
        writer.add(WEIGHTS, record.size, record.sha256, hashlib.sha256(after).hexdigest(), changes)
        write_patch(path, name, writer.done()[1])
    write_manifest(path, bundle.manifest)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("EDGEADAPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def patched(decoder, tmp_path_factory):
    """The decoder's bundle with patches of a and b, and its adapters."""
    path = tmp_path_factory.mktemp("patched") / "tiny.bundle"
    shutil.copytree(decoder[0], path)
    add_patches(path, decoder[3])
    return path


@pytest.fixture
def held(monkeypatch):
    """Hold every promotion before it opens its graphs, until the event is set."""
    go, original = threading.Event(), Promoter._patched_folder

    def wait(self, job):
        folder = original(self, job)
        assert go.wait(30)
        return folder

    monkeypatch.setattr(Promoter, "_patched_folder", wait)
    yield go
    go.set()


def logits(session) -> np.ndarray:
    return session.run(IDS)["logits"]


def finished(session, adapter) -> None:
    session.active.promoter._jobs[adapter].done.wait(30)


def test_the_session_switches_between_steps_when_the_weights_are_ready(patched, held):
    with open_session(patched, threads=1) as session:
        session.use("a")
        expected = logits(session)
        assert session.promotion("a") == Promotion("a", "slots")
        assert session.promote("a").state == "preparing"
        assert session.form == "slots"
        np.testing.assert_array_equal(logits(session), expected)  # tokens flow meanwhile
        held.set()
        finished(session, "a")
        found = logits(session)
        assert session.form == "promoted"
        done = session.promotion("a")
        assert (done.state, done.error) == ("promoted", None)
        assert done.seconds > 0
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
        assert not np.array_equal(found, expected)  # other sums: other weights were used
        assert not session.active.bindings["decoder"].graph.optional.keys() & {"lm_head.lora_A"}


def test_a_cache_goes_on_in_the_promoted_form(patched):
    ids = np.array([[5, 9, 2, 7, 1, 4]])
    with open_session(patched, threads=1) as session:
        session.use("a")
        whole = session.run({"input_ids": ids})["logits"]
        cache = session.new_cache(1, 16)
        session.step(ids[:, :3], cache)
        session.promote("a", wait=True)
        after = session.step(ids[:, 3:], cache)
        assert session.form == "promoted"
        np.testing.assert_allclose(after, whole[:, 3:], rtol=0, atol=2e-5)
        session.demote("a")
        again = session.new_cache(1, 16)
        session.step(ids[:, :3], again)
        np.testing.assert_array_equal(session.step(ids[:, 3:], again), whole[:, 3:])


def test_a_promoted_adapter_beside_others_is_as_in_slots(patched):
    """Rows with adapters of their own run in the slots graph; rows that all have the promoted one in its weights."""
    options = {"max_new_tokens": 8, "ignore_eos": True}
    with open_session(patched, threads=1) as session:
        expected = {}
        for name in ("a", "b"):
            session.use(name)
            expected[name] = session.complete("hello", **options)
        session.use("a")
        session.promote("a")
        finished(session, "a")
        for adapters in (["a", "b", "a"], ["a", "a"]):
            found = session.generate_batch(["hello"] * len(adapters), adapters=adapters, **options)
            assert found == [expected[name] for name in adapters]
        assert session.form == "promoted"


def test_adapters_swap_between_all_forms(patched):
    with open_session(patched, threads=1) as session:
        expected = {}
        for adapter in (None, "a", "b"):
            session.use(adapter)
            expected[adapter] = logits(session)
        session.use({"a": 0.5, "b": 0.5})
        blend = logits(session)
        session.promote("a", wait=True)
        session.promote("b", wait=True)
        for adapter in (None, "a", "b", "a", None, "b"):
            session.use(adapter)
            assert session.form == ("plain" if adapter is None else "promoted")
            np.testing.assert_allclose(logits(session), expected[adapter], rtol=0, atol=2e-5)
        session.use({"a": 0.5, "b": 0.5})
        assert session.form == "slots"
        np.testing.assert_array_equal(logits(session), blend)
        session.demote("b")
        session.use("b")
        assert session.form == "slots"
        np.testing.assert_array_equal(logits(session), expected["b"])


def test_demote_is_at_once_and_for_any_state(patched, held):
    with open_session(patched, threads=1) as session:
        session.use("a")
        expected = logits(session)
        session.demote("a")  # nothing to do
        session.promote("a")
        session.demote("a")  # while it is prepared
        held.set()
        session.promote("b", wait=True)  # the worker has come past the cancelled one
        assert session.promotion("a").state == "slots"
        session.promote("a", wait=True)
        logits(session)
        assert session.form == "promoted"
        session.demote("a")
        assert session.form == "slots"
        np.testing.assert_array_equal(logits(session), expected)


def test_the_weights_are_found_in_the_cache_the_next_time(patched, cache, monkeypatch):
    with open_session(patched, threads=1) as session:
        session.promote("a", wait=True)
    (entry,) = (path for path in (cache / "shared").iterdir() if path.is_dir())
    monkeypatch.setattr(promotion, "write_patched", None)
    with open_session(patched, threads=1) as session:
        session.promote("a", wait=True)
    (entry / "weights.bin").write_bytes(b"damaged")
    with open_session(patched, threads=1) as session, pytest.raises(TypeError):
        session.promote("a", wait=True)  # so it would be made again


def test_closing_cancels(patched, held, cache):
    session = open_session(patched, threads=1)
    session.promote("a")
    session.promote("b")
    threading.Timer(0.2, held.set).start()
    session.close()
    assert not any(thread.name.startswith("promotion") for thread in threading.enumerate())
    with pytest.raises(SessionError, match="the session is closed"):
        session.promote("a")


def test_cancelling_while_files_are_written_leaves_nothing(patched, cache, monkeypatch):
    original = promotion.write_patched

    def cancelled(bundle, name, folder, *, check):
        session.active.promoter._jobs[name].cancelled.set()
        return original(bundle, name, folder, check=check)

    monkeypatch.setattr(promotion, "write_patched", cancelled)
    with open_session(patched, threads=1) as session:
        session.promote("a", wait=True)
        assert session.promotion("a").state == "preparing"
        assert not any(path.is_dir() for path in (cache / "shared").iterdir())


def test_memory_has_a_limit_and_what_was_used_longest_ago_makes_room(patched):
    each = (patched / WEIGHTS).stat().st_size
    with open_session(patched, threads=1, promoted_max_bytes=each) as session:
        session.promote("a", wait=True)
        session.promote("b", wait=True)
        assert [session.promotion(name).state for name in "ab"] == ["slots", "promoted"]
        session.use("b")
        with pytest.raises(SessionError) as caught:
            session.promote("a")
        assert caught.value.message == (
            f"promoted weights take {each} bytes, promoted_max_bytes is {each}, and 'b' is in use"
        )
        session.use(None)
        session.promote("a", wait=True)
        assert session.promotion("b").state == "slots"
    with open_session(patched, threads=1, promoted_max_bytes=each - 1) as session:
        with pytest.raises(SessionError) as caught:
            session.promote("a")
        assert caught.value.message == f"promoted weights take {each} bytes, and promoted_max_bytes is {each - 1}"


def test_two_fit_by_default(patched):
    with open_session(patched, threads=1) as session:
        session.promote("a", wait=True)
        session.promote("b", wait=True)
        assert [session.promotion(name).state for name in "ab"] == ["promoted", "promoted"]


def test_after_so_many_tokens_by_itself(patched):
    with open_session(patched, threads=1, promote_after=8) as session:
        session.use({"a": 1.0, "b": 0.5})
        for _ in range(4):
            logits(session)
        session.use("a")
        logits(session)
        assert session.promotion("a").state == "slots"
        logits(session)
        finished(session, "a")
        logits(session)
        assert session.form == "promoted"
        assert session.promotion("b").state == "slots"


def test_what_has_no_patch_is_never_promoted_by_itself(decoder):
    with open_session(decoder[0], threads=1, promote_after=1) as session:
        session.use("a")
        logits(session)
        logits(session)
        assert session.promotion("a") == Promotion("a", "slots")
        with pytest.raises(BundleError, match="adapter 'a' has no patch: only an export with --patches makes one"):
            session.promote("a")
        with pytest.raises(BundleError, match="has no adapter 'c'"):
            session.promote("c")


def test_a_blend_is_refused(patched):
    with open_session(patched, threads=1) as session, pytest.raises(SessionError) as caught:
        session.promote({"a": 0.5, "b": 0.5})
    assert caught.value.message == "{'a': 0.5, 'b': 0.5} cannot be promoted: only one whole adapter can"
    assert caught.value.hint == "use the blend as it is"


@pytest.mark.parametrize("name", ["promote_after", "promoted_max_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "many"])
def test_settings_are_checked(patched, name, value):
    with pytest.raises(SessionError) as caught:
        open_session(patched, **{name: value})
    assert caught.value.message == f"{name} is {value!r}"


def test_failures_are_told_once_and_the_slots_go_on(patched, tmp_path):
    path = tmp_path / "damaged.bundle"
    shutil.copytree(patched, path)
    data = bytearray((path / WEIGHTS).read_bytes())
    data[0] ^= 1  # of the embedding, which no adapter changes
    with open_session(path, threads=1) as session:
        session.use("a")
        expected = logits(session)
        (path / WEIGHTS).write_bytes(data)
        session.promote("a")
        finished(session, "a")
        with pytest.warns(UserWarning, match="adapter 'a' stays in the slots graph: .* one of them is damaged; run"):
            found = logits(session)
        np.testing.assert_array_equal(found, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(session)
        assert session.form == "slots"
        assert session.promotion("a").state == "failed"
        assert isinstance(session.promotion("a").error, BundleError)
        with pytest.raises(BundleError, match="one of them is damaged"):
            session.promote("a", wait=True)  # tried again


def test_a_bug_in_the_background_is_raised(patched, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(promotion, "write_patched", broken)
    with open_session(patched, threads=1) as session:
        session.use("a")
        session.promote("a")
        finished(session, "a")
        with pytest.raises(ZeroDivisionError):
            logits(session)


def test_one_form_at_a_time(patched):
    with open_session(patched, threads=1, keep_graphs=False) as session:
        session.use("a")
        expected = logits(session)
        session.promote("a", wait=True)
        np.testing.assert_allclose(logits(session), expected, rtol=0, atol=2e-5)
        assert session.active.graphs == {}
        session.use("b")
        assert (session.form, len(session.active.graphs)) == ("slots", 1)


def test_other_kinds_of_model(classifier, seq2seq, tmp_path):
    ids = {"input_ids": np.array([[5, 9, 2]]), "attention_mask": np.ones((1, 3), np.int64)}
    made = [(classifier[0], classifier[2], ids), (seq2seq[0], seq2seq[1], {**ids, "decoder_input_ids": [[1, 4]]})]
    for index, (source, adapters, inputs) in enumerate(made):
        path = tmp_path / f"{index}.bundle"
        shutil.copytree(source, path)
        add_patches(path, adapters)
        with open_session(path, threads=1) as session:
            session.use("a")
            expected = session.run(inputs)["logits"]
            session.promote("a", wait=True)
            found = session.run(inputs)["logits"]
            assert session.form == "promoted"
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_two_sessions_promote_at_the_same_time(patched):
    def promote(_index):
        with open_session(patched, threads=1) as session:
            session.use("a")
            session.promote("a", wait=True)
            return logits(session)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(promote, range(2))
    np.testing.assert_array_equal(first, second)
