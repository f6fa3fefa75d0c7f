from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from edgeadapt.bundle import add
from edgeadapt.bundle.add import insert_adapter, remove_adapter
from edgeadapt.bundle.bind import bind
from edgeadapt.bundle.bundle import open_bundle
from edgeadapt.bundle.verify import verify_files
from edgeadapt.errors import BundleError, FileError
from edgeadapt.files import locked_directory


@pytest.fixture
def insert(manifest, make_adapter, golden, record):
    def run(bundle, name, *, seed=5, replace=False):
        return insert_adapter(
            bundle, name, bind(make_adapter(name, seed=seed), manifest), record, golden, replace=replace
        )

    return run


def tree(bundle):
    return {
        path.relative_to(bundle.path).as_posix(): path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()
    }


def copy(original, target):
    return open_bundle(shutil.copytree(original, target))


def sound(path):
    assert verify_files(open_bundle(path, check_files=False)) == []


def test_adding_and_removing(make_bundle, insert):
    bundle = make_bundle("one")
    before = tree(bundle)
    more = insert(bundle, "two")
    assert more.adapter_names == ("one", "two")
    assert set(tree(more)) - set(before) == {
        f"adapters/two/{file}" for file in ("adapter.json", "adapter.onnx_adapter", "golden.safetensors")
    }
    sound(bundle.path)
    less = remove_adapter(more, "two")
    assert tree(less) == before
    none = remove_adapter(less, "one")
    assert none.adapter_names == ()
    sound(bundle.path)
    assert insert(none, "one", seed=0).adapter_names == ("one",)
    assert tree(bundle) == before


def test_an_export_and_an_add_give_the_same_bytes(make_bundle, insert, tmp_path):
    exported = make_bundle("one", "two", target=tmp_path / "exported")
    added = insert(make_bundle("one", target=tmp_path / "added"), "two", seed=1)
    assert tree(added) == tree(exported)


def test_replacing(make_bundle, insert):
    bundle = make_bundle("one")
    with pytest.raises(BundleError) as caught:
        insert(bundle, "one")
    assert str(caught.value) == (
        "the bundle has an adapter 'one' already\nHint: choose another name with --name, or replace it with --force"
    )
    old = bundle.adapter_tensors("one")
    new = insert(bundle, "one", replace=True).adapter_tensors("one")
    assert not np.array_equal(old["norm.gain"], new["norm.gain"])
    sound(bundle.path)


def test_a_bundle_opened_before_another_add_loses_nothing(make_bundle, insert):
    early = make_bundle("one")
    insert(early, "two")
    assert insert(early, "three").adapter_names == ("one", "three", "two")


def test_refusals_change_nothing(make_bundle, manifest, insert, golden, record):
    bundle = make_bundle("one")
    before = tree(bundle)
    with pytest.raises(BundleError, match="differs from 'one' only in case"):
        insert(bundle, "ONE")
    with pytest.raises(BundleError, match="stands for the bare base"):
        insert(bundle, "none")
    with pytest.raises(BundleError, match="adapter 'x' sets 'input_ids', which is a data input of graph 'model'"):
        insert_adapter(bundle, "x", {"input_ids": np.ones(1, np.float32)}, record, golden)
    with pytest.raises(BundleError, match="has no adapter 'two'"):
        remove_adapter(bundle, "two")
    shutil.rmtree(bundle.path / "adapters" / "one")
    with pytest.raises(BundleError, match=r"adapters/one/adapter\.json is missing"):
        insert(bundle, "two")
    assert {name for name in before if not name.startswith("adapters")} == set(tree(bundle))


def test_another_bundle_in_its_place(make_bundle, manifest, insert):
    bundle = make_bundle("one")
    make_bundle("one", slots=manifest.slots[1:])  # without what the adapter needs
    with pytest.raises(BundleError) as caught:
        insert(bundle, "two")
    assert caught.value.message == f"{bundle.path} was replaced by another bundle meanwhile"


@pytest.mark.parametrize("name", ["one", "two"])
def test_ctrl_c_at_every_step_of_an_add(make_bundle, insert, interrupt_at, tmp_path, name):
    _at_every_step(
        make_bundle, tmp_path, lambda bundle: insert(bundle, name, replace=True), interrupt_at, KeyboardInterrupt()
    )


@pytest.mark.parametrize("name", ["one", "two"])
def test_an_io_error_at_every_step_of_an_add(make_bundle, insert, interrupt_at, tmp_path, name):
    _at_every_step(
        make_bundle,
        tmp_path,
        lambda bundle: insert(bundle, name, replace=True),
        interrupt_at,
        OSError(5, "Input/output error"),
    )


def _at_every_step(make_bundle, tmp_path, action, interrupt_at, error):
    """After a failure the bundle is byte for byte the old one or the new one, and nothing else lies there."""
    reference = make_bundle("one")
    original = shutil.copytree(reference.path, tmp_path / "original")
    old = tree(reference)
    new = tree(action(reference))
    assert old != new
    outcomes = []
    for step in range(1, 100):
        bundle = copy(original, tmp_path / str(step))
        done = interrupt_at(step, error, lambda bundle=bundle: action(bundle))
        outcomes.append(tree(bundle))
        assert outcomes[-1] in (old, new), step
        assert not any(path.name.startswith(".") for path in bundle.path.rglob("*")), step
        sound(bundle.path)
        if done:
            break
    assert outcomes[0] == old
    assert outcomes[-1] == new
    assert len(outcomes) > 10


@pytest.mark.parametrize("change", ["add", "replace", "remove"])
def test_a_kill_at_every_step(make_bundle, insert, kill_at, tmp_path, change):
    """The bundle opens with the old adapters or the new; the next change removes what was left."""
    actions = {
        "add": lambda bundle: insert(bundle, "two"),
        "replace": lambda bundle: insert(bundle, "one", replace=True),
        "remove": lambda bundle: remove_adapter(bundle, "one"),
    }
    reference = make_bundle("one")
    original = shutil.copytree(reference.path, tmp_path / "original")
    old = reference.manifest
    new = actions[change](reference).manifest
    seen = set()
    for step in range(1, 100):
        bundle = copy(original, tmp_path / str(step))
        done = kill_at(step, lambda bundle=bundle: actions[change](bundle))
        opened = open_bundle(bundle.path)
        assert opened.manifest in (old, new), step
        seen.add(opened.manifest == new)
        for name in opened.adapter_names:
            opened.adapter_tensors(name)
        findings = verify_files(opened)
        assert all(not finding.path.startswith("adapters/one/") or change == "remove" for finding in findings), step
        insert(opened, "three")
        sound(bundle.path)
        if done:
            break
    assert seen == {False, True}
    assert step > 4


def test_a_foreign_folder_stays(make_bundle, insert):
    bundle = make_bundle("one")
    mine = bundle.path / "adapters" / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("x")
    insert(bundle, "two")
    assert (mine / "notes.txt").exists()


def test_two_at_the_same_time(make_bundle, insert, monkeypatch):
    bundle = make_bundle("one")
    monkeypatch.setattr(add, "_WAIT_S", 0.1)
    with locked_directory(bundle.path, wait_s=0), pytest.raises(FileError) as caught:
        insert(bundle, "two")
    assert caught.value.message == f"another process is changing {bundle.path}"
    monkeypatch.undo()
    children = []
    for name in ("a", "b", "c", "d"):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                insert(bundle, name)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0, 0]
    assert open_bundle(bundle.path).adapter_names == ("a", "b", "c", "d", "one")
    sound(bundle.path)


def test_a_full_disk(make_bundle, manifest, make_adapter, golden, record, tmp_path):
    bundle = make_bundle("one")
    before = tree(bundle)
    tensors = bind(make_adapter(), manifest)
    np.savez(tmp_path / "t.npz", **tensors)
    code = f"""
        import resource, numpy as np
        from edgeadapt.bundle import insert_adapter, open_bundle
        from edgeadapt.errors import FileError
        bundle = open_bundle({str(bundle.path)!r})
        tensors = dict(np.load({str(tmp_path / "t.npz")!r}))
        size = bundle.manifest.files["adapters/one/adapter.onnx_adapter"].size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))
        try:
            insert_adapter(bundle, "two", tensors, bundle.manifest.adapters["one"], bundle.golden("one"))
        except FileError as error:
            print(error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    assert result.stdout == (
        f"cannot write {bundle.path / 'adapters' / 'two'}: the disk is full (File too large)\n"
        "Hint: free some space or choose a target on another disk; nothing was left behind\n"
    )
    assert tree(bundle) == before
    sound(bundle.path)


def test_a_merged_bundle_takes_no_adapter(make_bundle, insert, manifest):
    bundle = make_bundle()
    (bundle.path / "graph" / "model.slots.onnx").unlink()
    (bundle.path / "manifest.json").unlink()
    graphs = {"model": dataclasses.replace(manifest.graphs["model"], slots=None)}
    from edgeadapt.bundle.write import write_manifest

    write_manifest(bundle.path, dataclasses.replace(manifest, merged="m", graphs=graphs, slots=(), parameters=()))
    merged = open_bundle(bundle.path)
    sound(bundle.path)
    with pytest.raises(BundleError, match="adapter 'm' was merged into it"):
        insert_adapter(merged, "two", {}, None, None)
