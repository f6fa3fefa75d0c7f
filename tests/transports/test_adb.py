"""The real adb client against a double of a phone: what can go wrong, provoked and told."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import transports
from edgeadapt.profiling.transports import adb as module
from tests.transports.conftest import Target
from tests.transports.sshd import free_port
from tests.transports.waiting import pids_in, runs, wait_until


def refusal(device: Device) -> ProfileError:
    with pytest.raises(ProfileError) as caught:
        transports.connect(device)
    return caught.value


def named(address: str | None = None, **settings: object) -> Device:
    return Device("phone", "a test", "cpu", transport="adb", address=address, **settings)  # type: ignore[arg-type]


def client(*arguments: str) -> str:
    done = subprocess.run(["adb", *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def servers() -> list[int]:
    """Servers of adb on the tests' port."""
    port = os.environ["ANDROID_ADB_SERVER_PORT"]
    found = [process for process in psutil.process_iter(["name", "cmdline"]) if process.info["name"] == "adb"]
    return [process.pid for process in found if any(port in word for word in process.info["cmdline"] or ())]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "READY_S", 1.0)


def test_first_contact_with_a_device_that_trusts_only_then(adb, phone):
    """The real client first says that it failed to authenticate."""
    with adb.connect() as transport:
        assert transport.machine == os.uname().machine
        assert not transport.emulated
        assert len(servers()) == 1
    wait_until(lambda: servers() == [], "the server that was started is gone")


def test_a_server_that_runs_already_stays_and_is_left_as_it_was(phone):
    mine, other = phone(), phone()
    client("start-server")
    client("connect", other.address)
    wait_until(lambda: "device" in client("-s", other.address, "get-state").split(), "the other is connected")
    started = servers()
    device = named(mine.address, interpreter=sys.executable)
    transports.connect(device).close()
    assert servers() == started
    assert mine.address not in client("devices")
    assert other.address in client("devices")
    transports.connect(named(interpreter=sys.executable)).close()  # the only one that is left
    assert other.address in client("devices")
    again = refusal(named(interpreter=sys.executable, machine="riscv64"))
    assert again.message.startswith("device 'phone' is an riscv64 machine, and phone (the only one of adb) is ")


def test_no_device_and_two_devices(phone):
    assert str(refusal(named())) == (
        "phone (the only one of adb) is not connected (no devices)\nHint: plug it in with USB debugging switched on "
        "(Developer options); `adb devices` must show it as `device`"
    )
    client("start-server")
    both = sorted(phone().address for _ in range(2))
    for address in both:
        client("connect", address)
    wait_until(lambda: client("devices").count("\tdevice") == 2, "both are connected")
    error = refusal(named())
    assert error.message == "adb knows 2 devices, and which one is the 'phone' is not known"
    assert sorted(error.hint.removeprefix("give --address with one of: ").split(", ")) == both


def _unauthorized(phone) -> ProfileError:
    return refusal(named(phone(trusts=False).address))


def _offline(phone) -> ProfileError:
    """A device that was connected and went away is offline until adb gives up on it."""
    client("start-server")
    device = phone()
    client("connect", device.address)
    wait_until(lambda: "device" in client("-s", device.address, "get-state").split(), "it is connected")
    device.stop()
    wait_until(lambda: "offline" in client("devices"), "adb notices")
    return refusal(named())


def _no_server(phone) -> ProfileError:
    return refusal(named(f"127.0.0.1:{free_port()}"))


def _unplugged(phone) -> ProfileError:
    return refusal(named("R58M12345"))


PROVOKED = {
    "{where} does not trust this computer yet": _unauthorized,
    "{where} is offline for adb": _offline,
    "{where} does not answer adb": _no_server,
    "{where} is not connected": _unplugged,
}


@pytest.mark.parametrize("message", PROVOKED)
def test_every_known_failure_of_connecting_happens_for_real(message, phone, impatient):
    ((_, _, hint),) = [item for item in module.FAILURES if item[1] == message]
    error = PROVOKED[message](phone)
    address = error.message.partition("phone (")[2].partition(")")[0]
    assert error.message.startswith(f"{message.format(where=f'phone ({address})')} (")
    assert error.hint == hint
    client("kill-server")


def test_no_failure_is_known_that_is_not_provoked():
    """Only a USB device of another user's is beyond this machine: its line is what adb prints."""
    unproven = {message for _, message, _ in module.FAILURES} - set(PROVOKED)
    assert unproven == {"this user may not open {where} over USB"}
    said = (
        "R58M12345\tno permissions (user in plugdev group; are your udev rules wrong?); see [http://developer.android]"
    )
    assert module.explain(said, where="phone (R58M12345)").message.startswith(
        "this user may not open phone (R58M12345)"
    )


def test_a_server_that_does_not_start(phone, monkeypatch):
    """Another program has its port."""
    monkeypatch.setattr(module, "CALL_S", 1.0)
    address = phone().address
    with socket.create_server(("127.0.0.1", int(os.environ["ANDROID_ADB_SERVER_PORT"]))):
        assert str(refusal(named(address))) == (
            "adb start-server took longer than 1 s\nHint: try by hand: adb start-server; if it hangs: adb kill-server"
        )
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "http")
    error = refusal(named(address))
    assert error.message.startswith("adb's server does not start: ")


def test_a_phone_without_python_is_told_of_the_browser(adb):
    error = refusal(named(adb.device.address, interpreter="python-nowhere"))
    assert error.message.startswith(f"phone ({adb.device.address}) has no program 'python-nowhere' to run (")
    assert error.hint == (
        "install Python and numpy there, name another one with --interpreter, "
        "or let the phone's browser run it: --device phone"
    )
    assert adb.left() == []


def test_a_device_without_exit_statuses(phone):
    error = refusal(named(phone(features="cmd").address))
    assert error.message.endswith(" tells no exit status (before Android 7)")


def test_no_adb_here(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert str(refusal(named())) == "there is no program adb here\nHint: install it (Debian: apt install adb)"


@pytest.mark.parametrize("shell", ["mksh -c", "busybox sh -c", "bash -c", "dash -c"])
def test_the_shells_of_devices(shell, phone, files, tmp_path):
    """Android's is mksh; others have busybox's."""
    if shutil.which(shell.split()[0]) is None:
        pytest.skip(f"{shell.split()[0]} is not installed: run scripts/install-test-tools")
    # `sh` inside is the same shell
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "sh").write_text(f'#!/bin/bash\nexec {shell.removesuffix(" -c")} "$@"\n')
    (programs / "sh").chmod(0o755)
    device = phone(shell=tuple(shell.split()))
    device.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    target = Target(named(device.address, interpreter=sys.executable), tmp_path / "phone")
    note = tmp_path / "pids"
    with target.connect() as transport:
        folder = transport.send(files)
        with pytest.raises(ProfileError, match="took longer than 3 s"):
            transport.run(["bash", "hang.sh", str(note)], cwd=folder, timeout_s=3)
        wait_until(lambda: not any(map(runs, pids_in(note))), "the program and its child ended")
        done = transport.run(["echo", "it's", "$HOME"], cwd=folder)
    assert done == transports.Completed(0, "it's $HOME\n", "")
    assert target.left() == []


def test_a_device_that_is_lost_while_a_program_runs(phone, files, tmp_path):
    device, note = phone(), tmp_path / "pids"
    target = Target(named(device.address, interpreter=sys.executable), tmp_path / "phone")

    def unplug() -> None:
        pids_in(note)
        assert device.drop_connections() == 1

    def work() -> None:
        with target.connect() as transport:
            folder = transport.send(files)
            threading.Thread(target=unplug).start()
            transport.run([transport.interpreter, "hang.py", str(note)], cwd=folder)

    with pytest.raises(ProfileError) as caught:
        work()
    assert caught.value.message == f"phone ({device.address}) was lost: the connection ended before its work did"
    wait_until(lambda: not any(map(runs, pids_in(note))), "the program and its child ended")
    wait_until(lambda: target.left() == [], "the device removed its folder")


def test_a_device_that_is_lost_before_files_come(phone, files, tmp_path):
    device = phone()
    target = Target(named(device.address, interpreter=sys.executable), tmp_path / "phone")
    transport = target.connect()
    device.stop()
    with pytest.raises(ProfileError, match="was lost"), transport:
        transport.send(files)
    wait_until(lambda: target.left() == [], "the device removed its folder")


def test_a_full_disk(adb, small_disk, files):
    small_disk(adb.temporary)
    with adb.connect() as transport:
        with pytest.raises(ProfileError) as caught:
            transport.send(files)
        folder = transport.send({"small": files["tell.py"]})
        assert transport.run(["cat", "small"], cwd=folder).returncode == 0
    assert caught.value.message.startswith(f"the disk of phone ({adb.device.address}) is full: {adb.temporary}/")
    assert "remote write failed: No space left on device" in caught.value.message
    assert adb.left() == []


def test_the_double_refuses_a_wrong_signature(phone, tmp_path):
    """It would prove little if it let everybody in."""
    first = phone()
    client("start-server")
    client("connect", first.address)
    wait_until(lambda: "device" in client("-s", first.address, "get-state").split(), "it is connected")
    assert len(first.keys) == 1
    first.trusts = False
    client("disconnect", first.address)
    assert "connected to" in client("connect", first.address), "a known key needs no question"
    client("kill-server")
    shutil.rmtree(Path(os.environ["HOME"]) / ".android")
    client("start-server")
    client("connect", first.address)
    wait_until(lambda: "unauthorized" in client("devices"), "a new key is not known")
    assert len(first.keys) == 1
    with socket.create_connection(("127.0.0.1", first.port)) as wire:
        wire.settimeout(60)
        wire.sendall(bytes(24))
        assert wire.recv(1) == b"", "what is no adb is hung up on"
