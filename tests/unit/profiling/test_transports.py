"""Transports that need no server: this machine, a simulated device, and what an emulator is refused for."""

from __future__ import annotations

import os
import platform
import stat
import sys
from pathlib import Path

import pytest

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import transports
from edgeadapt.profiling.transports import Completed, _failures, _folder, emulated


def device(transport: str, **settings: object) -> Device:
    return Device("it", "a test", "cpu", transport=transport, **settings)  # type: ignore[arg-type]


def refusal(found: Device) -> str:
    with pytest.raises(ProfileError) as caught:
        transports.connect(found)
    return str(caught.value)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def big(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(bytes(100_000))
    return path


def test_this_machine_links_what_it_can(temporary, big):
    with transports.connect(device("local")) as transport:
        sent = Path(transport.send({"model/big": big})) / "model" / "big"
        assert sent.samefile(big)
        assert (transport.machine, transport.interpreter) == (platform.machine(), sys.executable)
        assert not transport.emulated
    assert big.stat().st_size == 100_000
    assert list(temporary.iterdir()) == []


def test_another_disk_gets_a_copy(temporary, big, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with transports.connect(device("local")) as transport:
        sent = Path(transport.send({"big": big})) / "big"
        assert not sent.samefile(big)
        assert sent.read_bytes() == big.read_bytes()


def test_a_link_to_a_file_is_sent_as_the_file(temporary, big, tmp_path):
    (tmp_path / "link").symlink_to(big)
    with transports.connect(device("local")) as transport:
        sent = Path(transport.send({"big": tmp_path / "link"})) / "big"
        assert stat.S_ISREG(sent.lstat().st_mode)
        assert sent.samefile(big)


def test_a_full_disk_here(temporary, big, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_folder, "link_or_copy", refuse)
    with transports.connect(device("local")) as transport:
        with pytest.raises(ProfileError) as caught:
            transport.send({"big": big})
        assert list(next(temporary.iterdir()).iterdir()) == []
    assert caught.value.message.startswith("the disk of it (this machine) is full: ")
    assert caught.value.message.endswith("does not take 1 files of 0.1 MB together (No space left on device)")


def test_no_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert refusal(device("local")) == (
        "this machine has no folder for temporary files: No such file or directory\n"
        "Hint: free some space, or point TMPDIR to a folder that you may write to"
    )


def test_an_address_of_this_machine_is_refused(temporary):
    assert refusal(device("local", address="pi@host")) == (
        "device 'it' is this machine and has no address, got 'pi@host'\n"
        "Hint: leave --address out, or choose a device with another transport"
    )


def test_another_machine_is_refused(temporary):
    assert refusal(device("local", machine="riscv64")).startswith("device 'it' is an riscv64 machine, and this one is ")
    assert list(temporary.iterdir()) == []


def test_another_python_of_this_machine(temporary, tmp_path):
    named = tmp_path / "my python"
    named.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    named.chmod(0o755)
    with transports.connect(device("local", interpreter=str(named))) as transport:
        assert transport.machine == platform.machine()
        done = transport.run([transport.interpreter, "-c", "print(1)"], cwd=transport.send({"a": named}))
    assert done == Completed(0, "1\n", "")
    assert refusal(device("local", interpreter="/nowhere/python")) == (
        "it (this machine) has no program '/nowhere/python' to run (/nowhere/python: No such file or directory)\n"
        "Hint: install Python and numpy there, name another one with --interpreter"
    )
    named.chmod(0o644)
    assert "has no program" in refusal(device("local", interpreter=str(named)))
    assert list(temporary.iterdir()) == []


def test_a_simulated_device_claims_to_be_what_its_file_says(temporary, big):
    with transports.connect(device("simulated")) as transport:
        assert (transport.machine, transport.emulated) == (platform.machine(), False)
    with transports.connect(device("simulated", machine="riscv64")) as transport:
        assert (transport.machine, transport.emulated) == ("riscv64", True)
        folder = transport.send({"a": big})
        done = transport.run([transport.interpreter, "-c", "print(input())"], cwd=folder, stdin="x")
    assert done == Completed(0, "x\n", "")
    assert transport.calls == [("send", "a"), ("run", sys.executable, "-c", "print(input())"), ("close",)]
    assert list(temporary.iterdir()) == []


LOST = "it (simulated) was lost: the connection ended before its work did"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("send:1:lost", LOST),
        ("run:2:lost", LOST),
        ("send:1:full", "the disk of it (simulated) is full: "),
        ("run:1:late", "runner.py took longer than 9 s on it (simulated) and was stopped there"),
        ("close:1:unsure", "it (simulated) did not confirm that "),
    ],
)
def test_a_simulated_device_fails_when_it_is_told_to(temporary, big, address, message):
    calls = []

    def work() -> None:
        with transports.connect(device("simulated", address=address)) as transport:
            folder = transport.send({"runner.py": big})
            calls.append("sent")
            transport.run(["true", "runner.py"], cwd=folder, timeout_s=9)
            calls.append("ran")
            transport.run(["true", "runner.py"], cwd=folder, timeout_s=9)
            calls.append("ran again")

    with pytest.raises(ProfileError) as caught:
        work()
    assert caught.value.message.startswith(message)
    assert (
        calls
        == {"s": [], "r": ["sent", "ran"] if "2" in address else ["sent"], "c": ["sent", "ran", "ran again"]}[
            address[0]
        ]
    )
    assert list(temporary.iterdir()) == []


def test_a_lost_device_stays_lost_and_that_is_told_once(temporary, big):
    """What was measured before can be kept: leaving the block is no further error."""
    with transports.connect(device("simulated", address="run:1:lost")) as transport:
        folder = transport.send({"a": big})
        for _ in range(2):
            with pytest.raises(ProfileError, match="was lost"):
                transport.run(["true"], cwd=folder)
    assert list(temporary.iterdir()) == []
    transport.close()


@pytest.mark.parametrize(
    ("failure", "done"), [("killed", Completed(-9, "", "")), ("garbled", Completed(0, '{"result": {"sch', ""))]
)
def test_programs_that_end_badly(temporary, big, failure, done):
    with transports.connect(device("simulated", address=f"run:1:{failure}")) as transport:
        folder = transport.send({"a": big})
        assert transport.run(["echo", "hi"], cwd=folder) == done
        assert transport.run(["echo", "hi"], cwd=folder) == Completed(0, "hi\n", "")


@pytest.mark.parametrize("address", ["", "lost", "fly:1:lost", "run:0:lost", "run:x:lost", "run:1:lost,"])
def test_what_is_no_failure(temporary, address):
    bad = address.rpartition(",")[2]
    assert refusal(device("simulated", address=address)) == (
        f"{bad!r} is no failure of a simulated device\nHint: "
        'give --address "CALL:NUMBER:FAILURE", such as run:2:lost; CALL is one of send, run, close'
    )


def test_a_failure_of_another_call(temporary):
    assert refusal(device("simulated", address="send:1:late")) == (
        "a simulated send does not fail as 'late'\nHint: known: lost, full"
    )


@pytest.fixture
def qemu(tmp_path, monkeypatch):
    """A program by qemu's name is enough for what is refused before it runs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "qemu-aarch64-static").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv(emulated.VARIABLE, raising=False)


def test_an_emulator_needs_qemu_and_its_files(qemu, tmp_path, monkeypatch, temporary):
    make = "make one with scripts/arm64-sysroot FOLDER, and give it as --address FOLDER or EDGEADAPT_ARM64_SYSROOT"
    found = device("emulated", address=str(tmp_path))
    assert refusal(device("emulated")) == f"no folder with arm64's files is named for the device 'it'\nHint: {make}"
    assert refusal(found) == f"{tmp_path} is no folder with arm64's files: it has no proc/cpuinfo\nHint: {make}"
    monkeypatch.setenv(emulated.VARIABLE, str(tmp_path / "other"))
    assert refusal(device("emulated")).startswith(f"{tmp_path}/other is no folder with arm64's files")
    info = tmp_path / "proc" / "cpuinfo"
    info.parent.mkdir()
    info.write_text("CPU part\t: 0xd0b\nCPU part\t: 0xd03\n")
    assert refusal(found) == (
        f"{info} describes a processor that is not emulated: CPU part 0xd03, 0xd0b\n"
        "Hint: known parts: 0xd03 (cortex-a53), 0xd0b (cortex-a76)"
    )
    info.write_text("model name : Intel\n")
    assert "CPU part not named" in refusal(found)
    info.write_text("CPU part\t: 0xd0b\n")
    assert refusal(found) == f"{tmp_path} holds no Python: no usr/bin/python3.*\nHint: {make}"
    monkeypatch.setenv("PATH", "")
    assert refusal(found) == (
        "there is no qemu for arm64 programs here\nHint: install it (Debian: apt install qemu-user-static)"
    )
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it gave no reason"),
        ("a\n b \n\n", "b"),
        (
            "tar: x: Cannot write: No space left on device\ntar: Exiting",
            "tar: x: Cannot write: No space left on device",
        ),
    ],
)
def test_the_line_that_says_the_most(text, reason):
    assert _failures.reason_in(text) == reason


def test_an_error_while_closing_does_not_hide_the_first_one(temporary, big):
    """The first is the one to tell; the second is noted beside it."""
    with pytest.raises(ZeroDivisionError) as caught, transports.connect(device("simulated", address="close:1:unsure")):
        _ = 1 / 0
    assert caught.value.__notes__[0].startswith("it (simulated) did not confirm that ")
