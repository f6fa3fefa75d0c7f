"""Weights shared between sessions: same results, one file, made again when damaged, never silently left out."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from edgeadapt.bundle.assemble import assemble
from edgeadapt.bundle.bundle import open_bundle
from edgeadapt.errors import BundleError, FileError, SessionError
from edgeadapt.runtime import device_cache, prepacked
from edgeadapt.runtime.device_cache import cache_folder
from edgeadapt.runtime.opening import open_session
from edgeadapt.runtime.ort import open_graph
from edgeadapt.runtime.prepacked import mapped_adapter, prepacked_graph

IDS = {"input_ids": np.array([[5, 9, 2, 7]])}
PLAIN, SLOTS = "graph/decoder.plain.onnx", "graph/decoder.slots.onnx"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("EDGEADAPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGEADAPT_SHARE_WEIGHTS", raising=False)
    return tmp_path / "cache" / "shared"


def outputs(path, adapter, **options):
    with open_session(path, threads=1, **options) as session:
        session.use(adapter)
        return session.run(IDS)["logits"], session.active.share_weights


def test_shared_sessions_give_the_same_outputs_and_map_one_file(decoder, cache):
    path = decoder[0]
    for adapter in (None, "a", "b"):
        ours, _ = outputs(path, adapter)
        shared, is_shared = outputs(path, adapter, share_weights=True)
        assert is_shared
        np.testing.assert_array_equal(ours, shared)
    files = list(cache.glob("*/weights.bin"))
    assert len(files) == 2  # the plain graph's and the slots graph's
    assert len({file.stat().st_ino for file in files}) == 1
    assert files[0].stat().st_size > 0


def test_an_open_session_holds_the_cached_file_and_no_weights_of_the_bundle(decoder, cache):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    with open_session(decoder[0], threads=1, share_weights=True) as session:
        session.use("a")
        session.run(IDS)
        assert f"{cache}/" in maps.read_text()
        assert str(decoder[0] / "graph" / "weights.bin") not in maps.read_text()


def test_a_second_session_makes_nothing_anew(decoder, cache, monkeypatch):
    outputs(decoder[0], "a", share_weights=True)

    def refuse(*_arguments):
        raise AssertionError

    monkeypatch.setattr(prepacked, "save_prepacked", refuse)
    assert outputs(decoder[0], "a", share_weights=True)[1]


def test_nothing_is_cached_unless_asked_for(decoder, cache, monkeypatch):
    outputs(decoder[0], "a")
    assert not cache.exists()
    monkeypatch.setenv("EDGEADAPT_SHARE_WEIGHTS", "1")
    assert outputs(decoder[0], "a")[1]
    shutil.rmtree(cache)
    outputs(decoder[0], "a", share_weights=False)  # the argument has the last word
    assert not cache.exists()


@pytest.mark.parametrize("file", ["weights.bin", "graph.onnx"])
@pytest.mark.parametrize("damage", ["changed", "shorter", "gone"])
def test_a_damaged_file_is_made_again(decoder, cache, file, damage):
    expected, _ = outputs(decoder[0], None, share_weights=True)
    (entry,) = cache.iterdir()
    good = (entry / file).read_bytes()
    if damage == "gone":
        (entry / file).unlink()
    else:
        (entry / file).write_bytes(bytes(len(good)) if damage == "changed" else good[:-1])
        os.utime(entry / file, ns=(1, 1))  # a clock too coarse to see the change would hide it
    found, is_shared = outputs(decoder[0], None, share_weights=True)
    assert is_shared
    np.testing.assert_array_equal(expected, found)
    assert (entry / file).read_bytes() == good


@pytest.mark.parametrize("text", ["", "{}", "[", '{"schema": "edgeadapt.shared/2"}'])
def test_a_damaged_record_is_made_again(decoder, cache, text):
    outputs(decoder[0], None, share_weights=True)
    (entry,) = cache.iterdir()
    (entry / "record.json").write_text(text)
    assert outputs(decoder[0], None, share_weights=True)[1]
    assert json.loads((entry / "record.json").read_text())["schema"] == "edgeadapt.shared/1"


def test_a_copied_cache_is_used_after_a_look_at_its_digests(decoder, cache, monkeypatch):
    outputs(decoder[0], None, share_weights=True)
    shutil.move(cache, cache.with_name("old"))
    shutil.copytree(cache.with_name("old"), cache, copy_function=shutil.copyfile)  # with new times
    monkeypatch.setattr(prepacked, "save_prepacked", None)
    assert outputs(decoder[0], None, share_weights=True)[1]


def test_adapters_are_views_of_a_file(decoder, cache):
    bundle = open_bundle(decoder[0])
    expected = assemble(bundle.adapter_tensors("a"), bundle.manifest)
    for _ in range(2):  # made, and found
        mapped = mapped_adapter(bundle, "a")
        assert mapped.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(mapped[name], value)
            assert not mapped[name].flags.writeable
            assert mapped[name].ctypes.data % 64 == 0
    assert len(list(cache.glob("*/tensors.bin"))) == 1


def test_a_damaged_adapter_of_the_cache_is_made_again(decoder, cache):
    expected, _ = outputs(decoder[0], "a", share_weights=True)
    (file,) = cache.glob("*/tensors.bin")
    file.write_bytes(bytes(file.stat().st_size))
    os.utime(file, ns=(1, 1))
    np.testing.assert_array_equal(outputs(decoder[0], "a", share_weights=True)[0], expected)


def test_blends_and_lent_adapters_work_on_mapped_ones(decoder, cache):
    found = []
    for share in (False, True):
        with open_session(decoder[0], threads=1, share_weights=share) as session:
            session.lend("mine", session.bundle.adapter_tensors("b"))
            session.use({"a": 0.5, "mine": 0.5})
            found.append(session.run(IDS)["logits"])
    np.testing.assert_array_equal(*found)


def test_a_cache_that_takes_the_graph_but_no_adapter_is_said(decoder, cache, monkeypatch):
    def full(_folder, _tensors):
        raise FileError("cannot write here", hint="free some space")

    monkeypatch.setattr(prepacked, "_write_tensors", full)
    with pytest.warns(UserWarning, match="adapters are not shared: cannot write here; free some space"):
        found, is_shared = outputs(decoder[0], "a", share_weights=True)
    assert is_shared
    np.testing.assert_array_equal(found, outputs(decoder[0], "a")[0])


def test_another_version_or_processor_gets_files_of_its_own(decoder, cache, monkeypatch):
    bundle = open_bundle(decoder[0])
    first = prepacked_graph(bundle, PLAIN)
    monkeypatch.setattr(prepacked, "version", lambda: "9.9.9")
    second = prepacked_graph(bundle, PLAIN)
    monkeypatch.setattr(prepacked, "_processor", lambda: "another")
    third = prepacked_graph(bundle, PLAIN)
    assert len({first, second, third}) == 3


def test_a_damaged_bundle_is_never_cached(decoder, cache, tmp_path):
    path = tmp_path / "copy.bundle"
    shutil.copytree(decoder[0], path)
    weights = path / "graph" / "weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(BundleError) as caught:
        outputs(path, None, share_weights=True)
    assert caught.value.message == f"{weights} is damaged: its SHA-256 is not the manifest's"
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_said_and_done_without(decoder, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("EDGEADAPT_CACHE_DIR", str(blocked))
    message = f"weights are not shared: cannot write {blocked / 'shared'}: Not a directory"
    with pytest.warns(UserWarning, match=re.escape(message)), pytest.warns(match="adapters are not shared"):
        found, is_shared = outputs(decoder[0], "a", share_weights=True)
    assert not is_shared
    np.testing.assert_array_equal(found, outputs(decoder[0], "a")[0])


def test_a_full_disk_is_said_and_leaves_nothing(decoder, cache, monkeypatch):
    def full(_source, target, _name):
        target.write_bytes(b"half")
        raise SessionError(f"{target} could not be written: No space left on device", hint="free some space")

    monkeypatch.setattr(prepacked, "save_prepacked", full)
    with pytest.warns(UserWarning, match="weights are not shared: .*No space left on device; free some space"):
        assert not outputs(decoder[0], None, share_weights=True)[1]
    assert list(cache.iterdir()) == []


def test_the_cache_stays_under_its_limit_and_drops_what_was_used_longest_ago(decoder, classifier, cache, monkeypatch):
    one, other = open_bundle(decoder[0]), open_bundle(classifier[0])
    old = prepacked_graph(one, PLAIN).parent
    os.utime(old / "record.json", (1, 1))
    new = prepacked_graph(one, SLOTS).parent
    used = sum(file.stat().st_size for file in new.iterdir()) + (old / "graph.onnx").stat().st_size
    needed = 3 * other.manifest.files["graph/weights.bin"].size
    monkeypatch.setenv("EDGEADAPT_CACHE_MAX_BYTES", str(used + needed + 10_000))
    prepacked_graph(other, "graph/model.plain.onnx")
    assert old.exists()
    monkeypatch.setenv("EDGEADAPT_CACHE_MAX_BYTES", str(used + needed - 1))
    prepacked_graph(other, "graph/model.slots.onnx")
    assert not old.exists()
    monkeypatch.setenv("EDGEADAPT_CACHE_MAX_BYTES", str(needed - 1))
    shutil.rmtree(cache)
    with pytest.raises(FileError) as caught:
        prepacked_graph(other, "graph/model.plain.onnx")
    assert caught.value.message == f"{cache} may hold {needed - 1} bytes, and {needed} are needed"
    assert caught.value.hint == "set EDGEADAPT_CACHE_MAX_BYTES to more"
    monkeypatch.setenv("EDGEADAPT_CACHE_MAX_BYTES", "4G")
    with pytest.raises(FileError, match="EDGEADAPT_CACHE_MAX_BYTES is '4G'"):
        prepacked_graph(other, "graph/model.plain.onnx")


def test_other_kinds_of_graph_are_the_same_when_shared(classifier, seq2seq, cache):
    ids = {"input_ids": np.array([[5, 9, 2]]), "attention_mask": np.ones((1, 3), np.int64)}
    for path, inputs in ((classifier[0], ids), (seq2seq[0], {**ids, "decoder_input_ids": np.array([[1, 4]])})):
        found = []
        for share in (False, True):
            with open_session(path, threads=1, share_weights=share) as session:
                session.use("a")
                found.append(session.run(inputs))
        for name, value in found[0].items():
            np.testing.assert_array_equal(value, found[1][name])


def test_what_cannot_be_is_refused(decoder, monkeypatch):
    monkeypatch.setattr("edgeadapt.runtime.opening.check_provider", lambda _provider: None)
    with pytest.raises(SessionError) as caught:
        open_session(decoder[0], provider="cuda", share_weights=True)
    assert caught.value.message == "share_weights is for the CPU, and the provider is 'cuda'"
    monkeypatch.setenv("EDGEADAPT_SHARE_WEIGHTS", "1")
    assert not open_session(decoder[0], provider="cuda").active.share_weights
    monkeypatch.setenv("EDGEADAPT_SHARE_WEIGHTS", "yes")
    with pytest.raises(SessionError) as caught:
        open_session(decoder[0])
    assert caught.value.message == "EDGEADAPT_SHARE_WEIGHTS is 'yes'"
    assert caught.value.hint == "set it to 1 or 0"


def test_a_cached_graph_opens_as_any_other(decoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph = open_graph(prepacked_graph(open_bundle(decoder[0]), SLOTS), threads=1)
    original = open_graph(open_bundle(decoder[0]).file(SLOTS), threads=1)
    assert graph.optional
    assert (graph.inputs, graph.optional, graph.outputs) == (original.inputs, original.optional, original.outputs)


def test_the_cache_lies_where_users_expect_it(monkeypatch):
    monkeypatch.delenv("EDGEADAPT_CACHE_DIR")
    monkeypatch.setattr(device_cache.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/edgeadapt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "edgeadapt"
    monkeypatch.setattr(device_cache.sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "edgeadapt"
    monkeypatch.setattr(device_cache.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "C:/Users/u/AppData/Local")
    assert cache_folder() == Path("C:/Users/u/AppData/Local/edgeadapt/cache")
