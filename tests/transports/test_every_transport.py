"""What holds for every kind of device: files arrive, programs run, and nothing stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgeadapt import registry
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import transports
from tests.transports.conftest import KINDS
from tests.transports.waiting import pids_in, runs, wait_until


def test_every_transport_is_tested_here():
    # a phone's browser takes neither files nor commands: tests/browser
    assert set(registry.names(transports.TRANSPORTS)) == {*KINDS, "phone"}


def test_a_program_gets_its_files_arguments_and_input(target, files):
    arguments = ["plain", "with space", "it's", "$HOME", "`id`", "", 'a"b', "*", "zwölf"]
    with target.connect() as transport:
        assert target.left() != []
        folder = transport.send(files)
        done = transport.run(
            [transport.interpreter, "tell.py", *arguments], cwd=folder, stdin="línea\nlast", timeout_s=100
        )
    assert done.returncode == 7, done
    assert done.stderr.splitlines()[-1] == "to the other stream"
    told = json.loads(done.stdout)
    assert told["arguments"] == arguments
    assert told["stdin"] == "línea\nlast"
    assert told["files"] == sorted(files)
    assert told["cwd"] == folder
    assert told["machine"] == transport.machine
    assert (told["sum"], told["size"]) == (10, 3_000_000)
    assert target.left() == []


def test_each_send_has_a_folder_of_its_own(target, files):
    with target.connect() as transport:
        first, second = transport.send({"a": files["tell.py"]}), transport.send({"b": files["hang.py"]})
        listed = transport.run(
            [transport.interpreter, "-c", "import os; print(*os.listdir())"], cwd=second, timeout_s=100
        )
    assert first != second
    assert listed == transports.Completed(0, "b\n", "")


def test_bytes_arrive_as_they_are(target, tmp_path):
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(256)) * 5000 + os.urandom(70_001))
    code = "import hashlib; print(hashlib.sha256(open('n','rb').read()).hexdigest(), end='')"
    with target.connect() as transport:
        done = transport.run([transport.interpreter, "-c", code], cwd=transport.send({"n": noise}), timeout_s=100)
    wanted = subprocess.run(["sha256sum", noise], capture_output=True, text=True, check=True).stdout.split()[0]
    assert done.stdout == wanted


def test_how_a_program_ended(target, files):
    with target.connect() as transport:
        folder = transport.send(files)
        killed = transport.run([transport.interpreter, "kill itself.py"], cwd=folder, timeout_s=100)
        assert killed.returncode == -signal.SIGKILL
        missing = transport.run([f"{folder}/nothing"], cwd=folder, timeout_s=100)
        assert (missing.returncode, missing.stdout) == (127 if target.device.transport != "emulated" else 1, "")
        empty = transport.run([transport.interpreter, "-c", "pass"], cwd=folder, timeout_s=100)
        assert empty == transports.Completed(0, "", "")


def test_a_program_that_takes_too_long_is_stopped_there_with_its_children(target, files, tmp_path):
    with target.connect() as transport:
        folder = transport.send(files)
        note = tmp_path / "pids"
        # a shell is there at once; the emulator runs nothing but arm64's own programs, and slowly
        emulated = target.device.transport == "emulated"
        hang, timeout_s = ([transport.interpreter, "hang.py"], 20) if emulated else (["sh", "hang.sh"], 4)
        with pytest.raises(ProfileError) as caught:
            transport.run([*hang, str(note)], cwd=folder, timeout_s=timeout_s)
        pids = pids_in(note)
        wait_until(lambda: not any(map(runs, pids)), "the program and its child ended")
        assert caught.value.message.startswith(f"{hang[1]} took longer than {timeout_s} s on ")
        assert caught.value.hint == "allow more time, or fewer repeats or tokens"
        again = transport.run([transport.interpreter, "-c", "print(1)"], cwd=folder, timeout_s=100)
        assert again.stdout == "1\n"
    assert target.left() == []


def test_ctrl_c_stops_the_program_and_removes_everything(target, files, tmp_path):
    note = tmp_path / "pids"

    def press() -> None:
        pids_in(note)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def work() -> None:
        with target.connect() as transport:
            folder = transport.send(files)
            threading.Thread(target=press).start()
            transport.run([transport.interpreter, "hang.py", str(note)], cwd=folder)

    with pytest.raises(KeyboardInterrupt):
        work()
    wait_until(lambda: not any(map(runs, pids_in(note))), "the program and its child ended")
    assert target.left() == []


def test_what_libraries_leave_behind_goes_too(target, files):
    """ONNX Runtime 1.32 writes a file .ses beside other temporary files."""
    code = "import tempfile; print(tempfile.mkdtemp())"
    with target.connect() as transport:
        done = transport.run([transport.interpreter, "-c", code], cwd=transport.send(files), timeout_s=100)
        assert target.temporary in Path(done.stdout.strip()).parents
        assert Path(done.stdout.strip()).is_dir()
    assert target.left() == []


def test_what_is_in_the_way_is_named(target, files, tmp_path):
    with target.connect() as transport:
        for name in ("../x", "/etc/x", "a//b", "a/./b", "", "a\\b"):
            with pytest.raises(ProfileError, match="is no name of a file inside a folder"):
                transport.send({name: files["tell.py"]})
        with pytest.raises(ProfileError, match="nowhere cannot be sent: it is no file"):
            transport.send({"a": tmp_path / "nowhere"})
        with pytest.raises(ProfileError, match="there are no files to send"):
            transport.send({})
    transport.close()  # a second time: nothing happens


def test_a_full_disk_of_this_machine(local, small_disk, files):
    """Those of other devices are in their transports' tests."""
    small_disk(local.temporary)
    with local.connect() as transport:
        with pytest.raises(ProfileError) as caught:
            transport.send(files)
        folder = transport.send({"small": files["tell.py"]})
        assert transport.run(["cat", "small"], cwd=folder).returncode == 0
    assert caught.value.message.startswith(f"the disk of it (this machine) is full: {local.temporary}/edgeadapt-")
    assert caught.value.message.endswith(" (No space left on device)")
    assert local.left() == []


@pytest.mark.parametrize("kind", ["ssh", "adb"])
def test_a_killed_host_leaves_nothing_on_the_device(kind, request, files, tmp_path):
    """The device notices by itself: no code of the host runs after SIGKILL."""
    target = request.getfixturevalue(kind)
    note = tmp_path / "pids"
    code = f"""
from pathlib import Path
from edgeadapt.device import Device
from edgeadapt.profiling import transports
transport = transports.connect({target.device!r})
folder = transport.send({{"hang.py": Path({str(files["hang.py"])!r})}})
transport.run([transport.interpreter, "hang.py", {str(note)!r}], cwd=folder)
"""
    host = subprocess.Popen([sys.executable, "-c", code])
    pids = pids_in(note)
    assert target.left() != []
    host.kill()
    host.wait()
    # its ssh and adb clients live in sessions of their own, and end when nobody holds their pipes
    wait_until(lambda: not any(map(runs, pids)), "the program and its child ended")
    wait_until(lambda: target.left() == [], "the folder is gone")


def test_an_unknown_transport_is_refused():
    with pytest.raises(ProfileError) as caught:
        transports.connect(Device("it", "a test", "cpu", transport="pigeon"))
    assert str(caught.value) == ("unknown transport 'pigeon'\nHint: known: adb, emulated, local, phone, simulated, ssh")


def test_files_below(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_text("")
    (tmp_path / "d").write_text("")
    assert transports.files_below(tmp_path) == {"a/b/c.txt": Path(tmp_path, "a/b/c.txt"), "d": tmp_path / "d"}
