"""Where errors stop: messages, hints and exit statuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgeadapt import settings
from edgeadapt.errors import AdapterError


def test_a_known_error_prints_message_and_hint_and_leaves_stdout_empty(invoke):
    result = invoke("export", "--recipe", "smolm2-chat")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "error: unknown recipe 'smolm2-chat'\n"
        "hint: did you mean 'smollm2-chat'? known: int4, merged, minilm-classifier, smollm2-chat, t5, vit; "
        "or give the path of a .toml file\n"
    )


def test_markup_in_an_error_is_printed_as_it_is(invoke, replace):
    def read_adapters(path):
        raise AdapterError("tensor [r, in] is [bold]wrong[/bold] in " + "a" * 200, hint="see [1]")

    replace("edgeadapt.adapters", read_adapters=read_adapters, describe=None)
    result = invoke("inspect", "x", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"error: tensor [r, in] is [bold]wrong[/bold] in {'a' * 200}\nhint: see [1]\n"


@pytest.mark.parametrize(
    ("module", "extra"),
    [("torch", "export"), ("transformers", "export"), ("onnx_ir.passes", "export"), ("PIL", "images")],
)
def test_a_missing_extra_is_named(invoke, monkeypatch, module, extra):
    def missing(kind):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(settings, "names", missing)
    result = invoke("list", "devices")
    assert result.exit_code == 1
    name = module.partition(".")[0]
    assert result.stderr == (
        f"error: this needs {name}, which is not installed\nhint: pip install 'edgeadapt[{extra}]'\n"
    )


def test_another_missing_module_is_a_bug(invoke, monkeypatch):
    def missing(kind):
        raise ModuleNotFoundError("No module named 'oops'", name="oops")

    monkeypatch.setattr(settings, "names", missing)
    with pytest.raises(ModuleNotFoundError, match="oops"):
        invoke("list", "devices")


def test_a_bug_keeps_its_traceback(invoke, monkeypatch):
    def broken(kind):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(settings, "names", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        invoke("list", "devices")


def test_an_interrupt_exits_with_130(invoke, monkeypatch):
    def interrupted(kind):
        raise KeyboardInterrupt

    monkeypatch.setattr(settings, "names", interrupted)
    result = invoke("list", "devices")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == "error: interrupted; nothing was left behind\n"


_SLEEPER = """
import sys, time
from edgeadapt import settings
from edgeadapt.cli.app import main

def names(kind):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

settings.names = names
sys.argv = ["edgeadapt", "list", "devices"]
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_let_contexts_clean_up(number, status):
    process = subprocess.Popen(
        [sys.executable, "-c", _SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (status, "cleaned up\n")
    assert "Traceback" not in err


_TRAP = """
import os, signal, sys, time
from edgeadapt import settings
from edgeadapt.cli.app import main
from edgeadapt.cli.progress import reporter

class Trap:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGNAME)
        time.sleep(0)

def names(kind):
    with reporter(quiet=True) as progress:
        with progress.stage("one"):
            Trap()
            print("still there", flush=True)
            RAISE
        print("too late", flush=True)

settings.names = names
sys.argv = ["edgeadapt", "list", "devices"]
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
@pytest.mark.parametrize(
    ("name", "status", "message"),
    [("SIGINT", 130, "error: interrupted; nothing was left behind\n"), ("SIGTERM", 143, "")],
)
@pytest.mark.parametrize("then", ["pass", "raise TypeError('of a library')"])
def test_a_signal_inside_a_destructor_is_not_lost(name, status, message, then):
    code = _TRAP.replace("SIGNAME", name).replace("RAISE", then)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (status, "still there\n", message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["export", "adapter", "-o", "out"], "--base: missing; give it here or in a recipe (--recipe)"),
        (["export", "adapter", "--base", "b"], "--output: missing; give it here or in a recipe (--recipe)"),
        (["export", "--base", "b", "-o", "out"], "ADAPTER...: missing; give it here or in a recipe (--recipe)"),
        (["export", "a", "--base", "b", "-o", "o", "--keep", "x"], "--keep: 'x' is not of the form PATTERN=SCHEME"),
        (["export", "a", "--base", "b", "-o", "o", "--keep", "x=int8", "--keep", "x=int4"], "--keep: 'x' occurs twice"),
        (["export", "a", "--max-kl", "small"], "--max-kl"),
        (["list", "everything"], "everything"),
        (["run", "b", "--blend", "a=x"], "--blend: 'x', the weight of 'a', is not a number"),
        (["run", "b", "--blend", "a=nan"], "--blend: 'nan', the weight of 'a', is not finite"),
        (["run", "b", "--blend", "a"], "--blend: 'a' is not of the form NAME=WEIGHT"),
        (["run", "b", "--blend", "a=1", "--adapter", "a"], "--adapter and --blend"),
        (["run"], "BUNDLE"),
        (["profile", "b"], "--device"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(invoke, args, message):
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr.replace("Invalid value for ", "")
    assert "Usage: edgeadapt" in result.stderr


def test_the_version(invoke):
    result = invoke("--version")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "0.1.0\n", "")


def test_python_dash_m_works_from_a_folder_with_spaces(tmp_path, root):
    folder = tmp_path / "with a space"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "edgeadapt", "list", "devices"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith(f"{settings.names('devices')[0]} ")
    assert result.stderr == ""
    assert list(Path(folder).iterdir()) == []
