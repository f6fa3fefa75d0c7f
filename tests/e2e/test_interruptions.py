"""Ctrl-C, kill -9, a full disk, a folder that may not be written to, and what --force keeps."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeadapt.bundle import open_bundle
from tests.e2e.conftest import Exported, Invoke, Tiny, content

Start = Callable[..., "subprocess.Popen[str]"]
LAST_CALL = {"pack": 2, "golden_outputs": 2, "write_manifest": 3, "sync_tree": 1}
posix = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")


@pytest.fixture
def llama(tiny: Callable[[str], Tiny]) -> Tiny:
    return tiny("llama")


def wait_for(process: subprocess.Popen[str], stage: str) -> None:
    """Read what the program says until it has finished a stage."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.rstrip().endswith(f" s  {stage}"):
            return
    pytest.fail(f"{stage!r} was never finished:\n{''.join(seen)}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@posix
@pytest.mark.parametrize(("finished", "forced"), [("load base", False), ("trace decoder", True)])
def test_ctrl_c_leaves_nothing(
    start: Start, llama: Tiny, exported: Exported, tmp_path: Path, finished: str, forced: bool
) -> None:
    """While torch traces, with nothing there; and while the graph is compared, with an old bundle there."""
    out = tmp_path / "out.bundle"
    if forced:
        shutil.copytree(exported("llama"), out)
        before = content(out)
    process = start("export", *llama.adapters, "--base", llama.base, "-o", out, *(["--force"] if forced else []))
    wait_for(process, finished)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (130, ""), stderr
    assert stderr.endswith("error: interrupted; nothing was left behind\n")
    assert "Traceback" not in stderr
    assert names(tmp_path) == (["out.bundle"] if forced else [])
    if forced:
        assert content(out) == before


@posix
@pytest.mark.parametrize(
    ("module", "function"),
    [("quantize.pack", "pack"), ("addition", "golden_outputs"), ("bundle", "write_manifest"), ("files", "sync_tree")],
)
def test_ctrl_c_while_it_writes(
    invoke: Invoke,
    llama: Tiny,
    exported: Exported,
    tmp_path: Path,
    traced_once: None,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    function: str,
) -> None:
    """A real SIGINT right after the last call of a function: up to all being written, before the exchange."""
    out = Path(shutil.copytree(exported("llama"), tmp_path / "out.bundle"))
    before = content(out)
    owner = importlib.import_module(f"edgeadapt.{module}")
    original = getattr(owner, function)
    calls = 0

    def counted(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        result = original(*args, **options)
        if calls == LAST_CALL[function]:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(owner, function, counted)
    result = invoke("export", llama.adapters[0], "--base", llama.base, "-o", out, "--force", "--quiet")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "error: interrupted; nothing was left behind\n"
    assert calls == LAST_CALL[function]
    assert names(tmp_path) == ["out.bundle"]
    assert content(out) == before


@posix
def test_a_killed_export_is_cleaned_up_by_the_next(
    start: Start, invoke: Invoke, llama: Tiny, tmp_path: Path, traced_once: None
) -> None:
    out = tmp_path / "out.bundle"
    process = start("export", *llama.adapters, "--base", llama.base, "-o", out)
    wait_for(process, "write")
    process.kill()
    process.communicate()
    (left,) = names(tmp_path)
    assert left.startswith(".out.bundle.tmp-")
    assert (tmp_path / left / "graph" / "weights.bin").is_file()
    result = invoke("export", *llama.adapters, "--base", llama.base, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert names(tmp_path) == ["out.bundle"]


def test_an_existing_bundle_and_force(
    invoke: Invoke, llama: Tiny, copied: Exported, tmp_path: Path, traced_once: None
) -> None:
    out = copied("llama")
    before = content(out)

    def export(*flags: str) -> tuple[int, str]:
        result = invoke("export", llama.adapters[0], "--base", llama.base, "-o", out, "--quiet", *flags)
        assert names(tmp_path) == ["llama.bundle"]
        return result.exit_code, result.stderr

    assert export() == (
        1,
        f"error: {out} exists already\nhint: choose another target, or replace it with --force\n",
    )
    assert content(out) == before
    status, message = export("--force", "--max-kl", "0")
    assert (status, message.partition(":")[0]) == (1, "error")
    assert message.startswith("error: the quality gate fails: ")
    assert content(out) == before
    assert export("--force") == (0, "")
    assert open_bundle(out).adapter_names == ("adapter0",)
    assert content(out) != before


@posix
def test_a_full_disk(invoke: Invoke, llama: Tiny, exported: Exported, tmp_path: Path, traced_once: None) -> None:
    """A limit on a file's size fails a write in the middle, as a full disk does."""
    import resource

    out = Path(shutil.copytree(exported("llama"), tmp_path / "out.bundle"))
    before = content(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        result = invoke("export", llama.adapters[0], "--base", llama.base, "-o", out, "--force", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: cannot write {out}: the disk is full (File too large)\n"
        "hint: free some space or choose a target on another disk; nothing was left behind\n"
    )
    assert names(tmp_path) == ["out.bundle"]
    assert content(out) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a disk of so many bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(size: int) -> Path:
        nonlocal mounted
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
        if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a small disk needs root on Linux")
        if (result := subprocess.run(command, capture_output=True, text=True, check=False)).returncode != 0:
            pytest.skip(f"a small disk cannot be mounted here: {result.stderr.strip()}")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small(
    invoke: Invoke, llama: Tiny, small_disk: Callable[[int], Path], traced_once: None
) -> None:
    disk = small_disk(2**18)
    out = disk / "out.bundle"
    needed = 2 * (llama.base / "model.safetensors").stat().st_size // 1000 * 1000
    result = invoke("export", llama.adapters[0], "--base", llama.base, "-o", out, "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    message, hint = result.stderr.splitlines()
    words = message.split()
    assert words[2:3] + words[4:5] + words[6:8] == ["needs", "bytes,", "only", words[7]]
    assert needed * 0.95 < int(words[3]) <= needed * 1.05
    assert int(words[7]) <= 2**18
    assert hint == "hint: free some space or choose a folder on another disk"
    assert names(disk) == []


def test_a_disk_that_fills_up(
    invoke: Invoke,
    llama: Tiny,
    small_disk: Callable[[int], Path],
    traced_once: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody else takes the room after it was found to be enough."""
    monkeypatch.setattr("edgeadapt.pipeline.require_free_space", lambda *_: None)
    disk = small_disk((llama.base / "model.safetensors").stat().st_size + 2**14)
    (disk / "mine").write_bytes(b"mine")
    flags = ("--quantize", "none", "--quiet")
    result = invoke("export", *llama.adapters, "--base", llama.base, "-o", disk / "out.bundle", *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: cannot write {disk / 'out.bundle'}: the disk is full (No space left on device)\n"
        "hint: free some space or choose a target on another disk; nothing was left behind\n"
    )
    assert names(disk) == ["mine"]


@posix
def test_a_folder_that_may_not_be_written_to(start: Start, llama: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "read only"
    folder.mkdir()
    folder.chmod(0o555)
    # Root may write anywhere, unless it gives up CAP_DAC_OVERRIDE (1): PR_CAPBSET_DROP (24), which holds after exec.
    drop = (
        "import ctypes, os, sys\n"
        "if os.geteuid() == 0 and 'DROPPED' not in os.environ:\n"
        "    if ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) != 0:\n"
        "        raise SystemExit(77)\n"
        "    os.environ['DROPPED'] = '1'\n"
        "    os.execv(sys.executable, sys.orig_argv)\n"
    )
    out = folder / "out.bundle"
    process = start("export", llama.adapters[0], "--base", llama.base, "-o", out, "--quiet", first=drop)
    stdout, stderr = process.communicate(timeout=300)
    folder.chmod(0o755)
    if process.returncode == 77:
        pytest.skip("root cannot give up its right to write anywhere here")
    assert (process.returncode, stdout) == (1, ""), stderr
    assert stderr == (
        f"error: cannot write {out}: Permission denied\nhint: check that {folder} is a folder that you may write to\n"
    )
    assert names(folder) == []
