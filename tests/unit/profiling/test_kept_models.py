"""Models that are kept: taken again only for what they were made of and for, and only as they were."""

from __future__ import annotations

import json
import re
import shutil
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from edgeadapt import remove_adapter
from edgeadapt.bundle import open_bundle
from edgeadapt.device import Device
from edgeadapt.errors import FileError, ProfileError
from edgeadapt.profiling import profile
from edgeadapt.profiling.compare import compare_bundles
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.kept_models import RECORD, prepared_models
from edgeadapt.profiling.runtimes import openvino, ort_mobile

SMALL = {"threads": 1, "prompt_tokens": 8, "new_tokens": 5, "repeats": 1, "attempts": 1}
HERE = Device("here", "this machine", "cpu", threads=1)
SHAPES = Shapes(1, 8, 13, (8,))
AGAIN = "choose another folder, or remove this one to have them made again"


def put(module, bundle, folder, kept, device=HERE, shapes=SHAPES):
    folder.mkdir(exist_ok=True)
    return prepared_models(module, open_bundle(bundle), device, folder, shapes, kept=kept)


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def ort_kept(decoder, tmp_path_factory):
    """Return a folder of kept .ort files, the job they were made in, and what is known of them."""
    folder = tmp_path_factory.mktemp("kept")
    models = put(ort_mobile, decoder, folder / "job", folder / "models")
    return folder / "models", folder / "job", models


@pytest.fixture
def kept(ort_kept, tmp_path):
    return shutil.copytree(ort_kept[0], tmp_path / "models")


def never(*_):
    raise AssertionError("they were made again")


def test_what_is_kept_is_what_is_measured(ort_kept):
    kept, job, _ = ort_kept
    found = files(kept)
    record = json.loads(found.pop(RECORD))
    assert found == files(job)
    assert {"model/decoder.plain.ort", "reports/required_operators_and_types.config"} < found.keys()
    assert set(record["sha256"]) == found.keys()


def test_they_are_made_once(decoder, kept, ort_kept, tmp_path, monkeypatch):
    _, job, made = ort_kept
    monkeypatch.setattr(ort_mobile, "prepare", never)
    found = put(ort_mobile, decoder, tmp_path / "job", kept, Device("pi", "another", "cpu", threads=3))
    assert files(tmp_path / "job") == files(job)
    assert found.options == {**made.options, "threads": 3}  # of the device that is measured now
    assert (found.files, found.notes, found.adapters, found.defaults) == (made.files, made.notes, None, {})


def test_a_profile_takes_them(decoder, kept, monkeypatch):
    monkeypatch.setattr(ort_mobile, "prepare", never)
    found = profile(decoder, runtime="ort-mobile", models=kept, **SMALL)
    assert all(check.relative_error < 1e-5 for check in found.checks)
    assert found.sizes.model_bytes > 0


def test_a_comparison_keeps_both_and_takes_what_a_profile_has_kept(decoder, kept, tmp_path, monkeypatch):
    other = shutil.copytree(decoder, tmp_path / "other.bundle")
    remove_adapter(other, "b")
    made = []
    prepare = ort_mobile.prepare

    def counted(module_bundle, *rest):
        made.append(module_bundle.path)
        return prepare(module_bundle, *rest)

    monkeypatch.setattr(ort_mobile, "prepare", counted)
    settings = {**SMALL, "rounds": 5}
    del settings["attempts"]
    found = compare_bundles(decoder, other, runtime="ort-mobile", models=(kept, tmp_path / "theirs"), **settings)
    assert made == [other]
    assert json.loads((tmp_path / "theirs" / RECORD).read_bytes())["origin"]["runtime"] == "ort_mobile"
    assert next(row for row in found.ratios if row.figure == "model_bytes").a > 0
    with pytest.raises(ProfileError, match=r"not kept in 1 folder"):
        compare_bundles(decoder, other, runtime="ort-mobile", models=(kept,), **settings)
    with pytest.raises(ProfileError, match="holds models for manifest_sha256"):
        compare_bundles(decoder, other, runtime="ort-mobile", models=(kept, kept), **settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": Device("pi", "a Pi", "cpu", machine="aarch64")}, "conversion"),
        ({"module": openvino}, "runtime 'ort_mobile', and 'openvino' is wanted"),
    ],
)
def test_models_for_something_else_are_refused(decoder, kept, tmp_path, change, said):
    before = files(kept)
    with pytest.raises(ProfileError, match=f"holds models for {said}") as caught:
        put(**{"module": ort_mobile, "bundle": decoder, "folder": tmp_path / "job", "kept": kept, **change})
    assert caught.value.hint == AGAIN
    assert files(kept) == before


def test_models_of_another_bundle_are_refused(decoder, kept, tmp_path):
    other = shutil.copytree(decoder, tmp_path / "other")
    remove_adapter(other, "b")
    with pytest.raises(ProfileError, match="holds models for manifest_sha256"):
        put(ort_mobile, other, tmp_path / "job", kept)


def _longer(folder):
    path = folder / "model" / "decoder.plain.ort"
    path.write_bytes(path.read_bytes() + b"\0")


def _more(folder):
    (folder / "model" / "mine.ort").write_bytes(b"")


def _fewer(folder):
    (folder / "model" / "decoder.slots.ort").unlink()


def _outside(folder):
    record = json.loads((folder / RECORD).read_bytes())
    record["sha256"]["../secret"] = "0" * 64
    (folder / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "name"),
    [(_longer, "decoder.plain.ort"), (_more, "mine.ort"), (_fewer, "decoder.slots.ort"), (_outside, "secret")],
)
def test_what_was_changed_is_not_measured(decoder, kept, tmp_path, damage, name):
    damage(kept)
    with pytest.raises(ProfileError, match=f"{name} is not what was kept there"):
        put(ort_mobile, decoder, tmp_path / "job", kept)
    assert not files(tmp_path / "job")


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "edgeadapt.models/2"}', "[1]"])
def test_a_damaged_record_is_refused(decoder, kept, tmp_path, text):
    (kept / RECORD).write_text(text)
    with pytest.raises(ProfileError, match=r"models\.json"):
        put(ort_mobile, decoder, tmp_path / "job", kept)


def test_inputs_of_adapters_are_kept_too(decoder, tmp_path):
    module = ModuleType("edgeadapt.profiling.runtimes.fed")
    adapters = {
        name: {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T * scale} for name, scale in (("x", 1), ("y", 2))
    }
    defaults = {"a": np.zeros((3, 2), np.float32), "n": np.ones((), np.int64)}

    def prepare(_bundle, device, folder, _shapes):
        (folder / "model").mkdir()
        (folder / "model" / "m").write_bytes(b"m")
        return Models(
            {"plain": "model/m"}, {"threads": device.threads, "shapes": {"n": [], "a": [1, 2]}}, adapters, defaults
        )

    module.prepare, module.made_for = prepare, lambda _device, shapes: {"longest": shapes.total_tokens}
    put(module, decoder, tmp_path / "one", tmp_path / "models")
    module.prepare = never
    found = put(module, decoder, tmp_path / "two", tmp_path / "models")
    assert found.options == {"threads": 1, "shapes": {"n": [], "a": [1, 2]}}
    assert list(found.options["shapes"]) == ["n", "a"]  # the order in which they are fed
    assert files(tmp_path / "two") == {"model/m": b"m"}
    for name, arrays in adapters.items():
        np.testing.assert_array_equal(found.adapters[name]["a"], arrays["a"])
    np.testing.assert_array_equal(found.defaults["a"], defaults["a"])
    assert (found.defaults["n"].shape, found.defaults["n"].dtype) == ((), np.int64)
    with pytest.raises(ProfileError, match="longest 13, and 14 is wanted"):
        put(module, decoder, tmp_path / "three", tmp_path / "models", shapes=Shapes(1, 8, 14))


def test_nothing_is_kept_of_what_failed(decoder, tmp_path, monkeypatch):
    def broken(_bundle, _device, folder, _shapes):
        (folder / "model").mkdir()
        (folder / "model" / "half").write_bytes(b"half")
        raise ProfileError("no", hint="no")

    monkeypatch.setattr(ort_mobile, "prepare", broken)
    with pytest.raises(ProfileError, match="no"):
        put(ort_mobile, decoder, tmp_path / "job", tmp_path / "new" / "models")
    assert {path.name for path in tmp_path.iterdir()} == {"job"}


def test_another_folder_of_the_users_is_left_alone(decoder, tmp_path):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter").write_text("1")
    with pytest.raises(FileError, match="is not replaced"):
        put(ort_mobile, decoder, tmp_path / "job", mine)
    assert files(mine) == {"chapter": b"1"}
    assert not files(tmp_path / "job")  # before anything was made


def test_what_was_made_is_measured_where_another_process_has_filled_the_folder_meanwhile(
    decoder, kept, tmp_path, monkeypatch
):
    prepare, target = ort_mobile.prepare, tmp_path / "theirs"

    def slow(*args):
        shutil.copytree(kept, target)
        return prepare(*args)

    monkeypatch.setattr(ort_mobile, "prepare", slow)
    found = profile(decoder, runtime="ort-mobile", models=target, **SMALL)
    assert found.latency_p50_s > 0
    assert [note for note in found.notes if note.startswith(f"these models are not kept: {target} is not replaced")]
    assert files(target) == files(kept)


def test_what_was_made_is_measured_where_it_fits_on_no_disk(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    found = put(ort_mobile, decoder, tmp_path / "job", tmp_path / "models")
    (note,) = (note for note in found.notes if note.startswith("these models are not kept"))
    assert re.search(r"needs \d+ bytes, but only 1 are free on its disk$", note)
    assert {"model/decoder.plain.ort", "model/decoder.slots.ort"} <= files(tmp_path / "job").keys()
    assert {path.name for path in tmp_path.iterdir()} == {"job"}


@pytest.mark.parametrize("runtime", ["session", "onnxruntime", "torch"])
def test_a_runtime_that_makes_none_says_so(decoder, tmp_path, runtime):
    with pytest.raises(ProfileError, match=f"runtime '{runtime}' opens the bundle's own files"):
        profile(decoder, runtime=runtime, models=tmp_path / "models", **SMALL)
    assert not list(tmp_path.iterdir())
