from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from edgeadapt import files
from edgeadapt.errors import BundleError, FileError
from edgeadapt.files import (
    canonical_json,
    check_writable,
    locked_directory,
    parse_json,
    read_bytes,
    require_free_space,
    sha256_file,
    staged_directory,
    write_atomically,
)


def _make(target: Path, text: str, *, force: bool = False) -> None:
    with staged_directory(target, force=force) as folder:
        (folder / "manifest.json").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / f"{text}.bin").write_bytes(b"x")


def _tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_staged_folder_appears_whole(tmp_path):
    target = tmp_path / "new parent" / "with space.bundle"
    with staged_directory(target, force=False) as folder:
        assert folder.parent == target.parent
        (folder / "manifest.json").write_text("1")
        assert not target.exists()
    assert _tree(tmp_path) == [
        "new parent",
        "new parent/with space.bundle",
        "new parent/with space.bundle/manifest.json",
    ]


def test_an_existing_target_needs_force(tmp_path):
    target = tmp_path / "t"
    _make(target, "old")
    with pytest.raises(FileError) as caught, staged_directory(target, force=False):
        pytest.fail("the block must not run")
    assert str(caught.value) == f"{target} exists already\nHint: choose another target, or replace it with --force"
    assert _tree(tmp_path) == ["t", "t/manifest.json", "t/sub", "t/sub/old.bin"]


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_the_whole_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda _one, _other: False)
    target = tmp_path / "t"
    _make(target, "old")
    _make(target, "new", force=True)
    assert _tree(tmp_path) == ["t", "t/manifest.json", "t/sub", "t/sub/new.bin"]
    assert (target / "manifest.json").read_text() == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize("existing", [True, False])
def test_an_exception_leaves_nothing_and_the_old_target(tmp_path, error, existing):
    target = tmp_path / "made" / "t"
    if existing:
        _make(target, "old")
    before = _tree(tmp_path)

    def fail() -> None:
        with staged_directory(target, force=True) as folder:
            (folder / "half").write_bytes(b"x")
            raise error

    with pytest.raises(error):
        fail()
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("exchange", [True, False])
def test_ctrl_c_at_every_step(tmp_path, monkeypatch, interrupt_at, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda _one, _other: False)
    target = tmp_path / "t"
    _make(target, "old")
    old, new = _tree(tmp_path), ["t", "t/manifest.json", "t/sub", "t/sub/new.bin"]
    seen = set()
    for step in range(1, 100):
        if interrupt_at(step, KeyboardInterrupt(), lambda: _make(target, "new", force=True)):
            break
        assert _tree(tmp_path) in (old, new), step
        seen.add((target / "manifest.json").read_text())
        if _tree(tmp_path) == new:
            _make(target, "old", force=True)
    else:
        pytest.fail("never finished")
    assert step > 5
    assert "old" in seen


def test_force_does_not_replace_what_is_not_ours(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years")
    with pytest.raises(FileError) as caught, staged_directory(home, force=True):
        pass
    assert caught.value.message == f"{home} is not replaced: it holds no manifest.json, so it was not made by edgeadapt"
    assert _tree(tmp_path) == ["home", "home/thesis.txt"]
    (home / "thesis.txt").unlink()
    _make(home, "new", force=True)  # an empty folder is free to take


def test_a_file_or_link_is_not_replaced(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("x")
    link.symlink_to(tmp_path)
    for target, noun in ((file, "a file"), (link, "a symbolic link")):
        with pytest.raises(FileError) as caught, staged_directory(target, force=True):
            pass
        assert caught.value.message == f"{target} is {noun}, not a folder"
    assert file.read_text() == "x"
    assert link.is_symlink()


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "t", tmp_path / "file" / "deeper" / "t"):
        with pytest.raises(FileError) as caught, staged_directory(target, force=False):
            pass
        assert caught.value.message.startswith("cannot ")
        assert caught.value.message.endswith(": Not a directory")
        assert "that you may write to" in caught.value.hint
    assert _tree(tmp_path) == ["file"]


def test_a_target_that_appears_meanwhile_wins(tmp_path):
    target = tmp_path / "t"

    def late() -> None:
        with staged_directory(target, force=False) as folder:
            (folder / "manifest.json").write_text("late")
            _make(target, "early")

    with pytest.raises(FileError, match="exists already"):
        late()
    assert _tree(tmp_path) == ["t", "t/manifest.json", "t/sub", "t/sub/early.bin"]


def test_what_a_killed_process_left_is_removed_but_not_a_live_one(tmp_path):
    target = tmp_path / "t"
    code = f"""
        import os, signal
        from pathlib import Path
        from edgeadapt.files import staged_directory
        with staged_directory(Path({str(target)!r}), force=False) as folder:
            (folder / "half").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert len(_tree(tmp_path)) == 2
    with staged_directory(target, force=False) as live:
        assert [path.parent for path in tmp_path.iterdir()] == [tmp_path]  # the dead one is gone
        _make(target, "second")  # beside a live one
        assert live.is_dir()
        live.joinpath("manifest.json").write_text("first")
        target.rename(tmp_path / "moved")
    assert (target / "manifest.json").read_text() == "first"


def test_a_full_disk_leaves_nothing(tmp_path):
    target = tmp_path / "t"
    code = f"""
        import resource
        from pathlib import Path
        from edgeadapt.errors import FileError
        from edgeadapt.files import staged_directory, write_atomically
        Path({str(tmp_path / "old")!r}).write_bytes(b"old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        def staged():
            with staged_directory(Path({str(target)!r}), force=False) as folder:
                (folder / "small").write_bytes(bytes(10))
                (folder / "big").write_bytes(bytes(10_000))
        for write in (staged, lambda: write_atomically(Path({str(tmp_path / "old")!r}), bytes(10_000))):
            try:
                write()
            except FileError as error:
                print(error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    hint = "Hint: free some space or choose a target on another disk; nothing was left behind"
    assert result.stdout.splitlines() == [
        f"cannot write {target}: the disk is full (File too large)",
        hint,
        f"cannot write {tmp_path / 'old'}: the disk is full (File too large)",
        hint,
    ]
    assert _tree(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_native_librarys_full_disk_is_a_file_error(tmp_path):
    with pytest.raises(FileError, match="the disk is full"), staged_directory(tmp_path / "t", force=False):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="other"), staged_directory(tmp_path / "t", force=False):
        raise RuntimeError("other")
    assert _tree(tmp_path) == []


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"

    def refuse(_descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FileError) as caught:
        write_atomically(path, b"three")
    assert caught.value.message == f"cannot write {path}: Input/output error"
    assert path.read_bytes() == b"two"
    assert _tree(tmp_path) == ["f"]


def test_whether_a_file_can_be_written_is_known_before(tmp_path):
    path = tmp_path / "f"
    check_writable(path)
    assert _tree(tmp_path) == []
    path.write_bytes(b"old")
    check_writable(path)
    assert path.read_bytes() == b"old"
    for wrong in (tmp_path, path / "below", tmp_path / "missing" / "f"):
        with pytest.raises(FileError):
            check_writable(wrong)
    assert _tree(tmp_path) == ["f"]


def test_a_lock_is_exclusive_and_goes_with_its_process(tmp_path):
    code = f"""
        import os, sys
        from pathlib import Path
        from edgeadapt.files import locked_directory
        with locked_directory(Path({str(tmp_path)!r}), wait_s=0):
            print("locked", flush=True)
            sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(FileError) as caught, locked_directory(tmp_path, wait_s=0):
            pass
        assert caught.value.message == f"another process is changing {tmp_path}"
        process.kill()
    with locked_directory(tmp_path, wait_s=0):
        assert _tree(tmp_path) == []


def test_a_lock_without_folder_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_flock", lambda _folder: None)
    with locked_directory(tmp_path, wait_s=0):
        assert _tree(tmp_path) == [".lock"]
        with pytest.raises(FileError, match="another process"), locked_directory(tmp_path, wait_s=0.1):
            pass
    assert _tree(tmp_path) == []


def test_a_lock_on_nothing(tmp_path):
    with pytest.raises(FileError, match="is not a folder"), locked_directory(tmp_path / "no", wait_s=0):
        pass


def test_reading(tmp_path):
    path = tmp_path / "f"
    with pytest.raises(FileError) as caught:
        sha256_file(path)
    assert str(caught.value) == (
        f"cannot read {path}: No such file or directory\nHint: check the path and its permissions"
    )
    path.write_bytes(b"abc")
    assert sha256_file(path) == hashlib.sha256(b"abc").hexdigest()
    assert read_bytes(path, max_bytes=3) == b"abc"
    with pytest.raises(FileError, match="has 3 bytes, at most 2 are allowed"):
        read_bytes(path, max_bytes=2)


def test_canonical_json():
    assert canonical_json({"b": [1, np.float32(0.5)], "a": "é"}) == (
        '{\n  "a": "é",\n  "b": [\n    1,\n    0.5\n  ]\n}\n'.encode()
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
    with pytest.raises(TypeError, match="ndarray is not JSON"):
        canonical_json(np.zeros(2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "a": 2}', "f: not valid JSON: key 'a' occurs twice"),
        (b"[NaN]", "f: not valid JSON: NaN is not a JSON number"),
        (b"[1", "f: not valid JSON: Expecting ',' delimiter: line 1 column 3 (char 2)"),
        (b"\xff", "f: not valid JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_strict_json(data, message):
    with pytest.raises(BundleError) as caught:
        parse_json(data, "f", BundleError)
    assert caught.value.message == message


def test_deep_json_is_an_error():
    with pytest.raises(BundleError, match="not valid JSON"):
        parse_json(b"[" * 100_000, "f", BundleError)


def test_free_space(tmp_path):
    require_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(FileError, match=r"not/yet needs 9{30} bytes, but only \d+ are free on its disk"):
        require_free_space(tmp_path / "not" / "yet", int("9" * 30))
