"""A real OpenSSH server: what can go wrong with it, provoked and told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import transports
from edgeadapt.profiling.transports import ssh as module
from tests.transports.conftest import Target
from tests.transports.sshd import Sshd, free_port
from tests.transports.waiting import pids_in, runs, wait_until


def refusal(target: Target, **changes: object) -> ProfileError:
    with pytest.raises(ProfileError) as caught:
        target.connect(**changes)
    return caught.value


def test_user_host_and_port(ssh, sshd):
    with ssh.connect(address=f"{sshd.user}@127.0.0.1:{sshd.port}") as transport:
        assert transport.machine == os.uname().machine
        assert transport.interpreter == sys.executable
        assert not transport.emulated
        assert len(sshd.connections()) > 0
    wait_until(lambda: sshd.connections() == [], "the connection ended")
    assert not transport._socket.exists()


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("pi", ("pi", None)),
        ("me@pi.local:2222", ("me@pi.local", "2222")),
        ("me@[fe80::1%eth0]:22", ("me@fe80::1%eth0", "22")),
        ("fe80::1%eth0", ("fe80::1%eth0", None)),
        ("192.168.0.7:22", ("192.168.0.7", "22")),
    ],
)
def test_addresses(address, parts):
    assert module._parse(Device("pi", "a test", "cpu", address=address)) == parts


@pytest.mark.parametrize(
    "address", ["", "-oProxyCommand=reboot", "me@-oProxyCommand=x", "a b", "pi:port", "pi:", "@", "me@"]
)
def test_what_is_no_address(address):
    with pytest.raises(ProfileError) as caught:
        transports.connect(Device("pi", "a test", "cpu", transport="ssh", address=address))
    assert str(caught.value) == f"{address!r} is no address for ssh\nHint: give --address user@host, or user@host:port"


def test_no_address():
    with pytest.raises(ProfileError) as caught:
        transports.connect(Device("pi", "a test", "cpu", transport="ssh"))
    assert str(caught.value) == (
        "where the device 'pi' is, is not known\n"
        "Hint: give --address user@host, or user@host:port; on the device itself, use --device cpu"
    )


def _unknown_host(ssh: Target, sshd: Sshd) -> ProfileError:
    return refusal(ssh, address="nobody@host.invalid")


def _no_server(ssh: Target, sshd: Sshd) -> ProfileError:
    return refusal(ssh, address=f"127.0.0.1:{free_port()}")


def _silence(ssh: Target, sshd: Sshd) -> ProfileError:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CONNECT_S", 1)
        return refusal(ssh, address=f"127.0.0.1:{listener.getsockname()[1]}")


def _another_server(ssh: Target, sshd: Sshd) -> ProfileError:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            listener.accept()[0].close()

        threading.Thread(target=hang_up).start()
        return refusal(ssh, address=f"127.0.0.1:{listener.getsockname()[1]}")


def _changed_key(ssh: Target, sshd: Sshd) -> ProfileError:
    sshd.know("other.pub")
    return refusal(ssh)


def _unknown_key(ssh: Target, sshd: Sshd) -> ProfileError:
    sshd.known_hosts.write_text("")
    return refusal(ssh)


def _refused_key(ssh: Target, sshd: Sshd) -> ProfileError:
    sshd.configure_client("other")
    return refusal(ssh)


PROVOKED = {
    "the host of": _unknown_host,
    "{where} refuses connections": _no_server,
    "{where} does not answer": _silence,
    "what answers at": _another_server,
    "{where} shows another host key": _changed_key,
    "the host key of": _unknown_key,
    "{where} does not let this user in": _refused_key,
}


@pytest.mark.parametrize("beginning", PROVOKED)
def test_every_known_failure_of_connecting_happens_for_real(beginning, ssh, sshd):
    ((_, message, hint),) = [item for item in module.FAILURES if item[1].startswith(beginning)]
    error = PROVOKED[beginning](ssh, sshd)
    address = error.message.partition("pi (")[2].partition(")")[0]
    assert error.message.startswith(f"{message.format(where=f'pi ({address})')} (")
    assert error.hint == hint.format(host=address.partition(":")[0] if "127" in address else address)
    assert ssh.left() == []


def test_no_failure_is_known_that_is_not_provoked():
    unproven = [message for _, message, _ in module.FAILURES if not message.startswith(tuple(PROVOKED))]
    assert unproven == []


def test_the_whole_message_of_an_unknown_host_key(ssh, sshd):
    error = _unknown_key(ssh, sshd)
    assert str(error) == (
        "the host key of pi (device) is not known yet (Host key verification failed.)\n"
        "Hint: log in once by hand and compare the fingerprint: ssh device"
    )


def test_a_wrong_interpreter(ssh, tmp_path):
    error = refusal(ssh, interpreter="/nowhere/python3")
    assert error.message.startswith("pi (device) has no program '/nowhere/python3' to run (")
    assert error.hint == "install Python and numpy there, name another one with --interpreter"
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    assert str(refusal(ssh, interpreter=str(bare))) == (
        f"the Python {str(bare)!r} of pi (device) has no numpy\n"
        f"Hint: install it there: {bare} -m pip install numpy, or name another Python with --interpreter"
    )
    assert refusal(ssh, interpreter="echo").message.startswith("'echo' of pi (device) does not run as Python: -c ")
    assert (
        refusal(ssh, interpreter="false").message == "'false' of pi (device) does not run as Python: it gave no reason"
    )
    assert ssh.left() == []


def test_an_old_interpreter(ssh, monkeypatch):
    monkeypatch.setattr("edgeadapt.profiling.transports._python.OLDEST", (99, 1))
    error = refusal(ssh)
    assert error.message.endswith(f" of pi (device) is 3.{sys.version_info[1]}")
    assert error.hint == "install 99.1 or newer there, and name it with --interpreter"


def test_another_machine(ssh):
    here = os.uname().machine
    assert str(refusal(ssh, machine="riscv64")) == (
        f"device 'pi' is an riscv64 machine, and pi (device) is {here}\nHint: give the address of the right machine, "
        "another --device, or another Python with --interpreter"
    )
    assert ssh.left() == []
    with ssh.connect(machine=here) as transport:
        assert transport.machine == here


def test_no_ssh_here(ssh, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert str(refusal(ssh)) == (
        "there is no program ssh here\nHint: install OpenSSH (Debian: apt install openssh-client)"
    )


def test_a_device_that_is_lost_while_a_program_runs(ssh, sshd, files, tmp_path):
    note = tmp_path / "pids"

    def drop() -> None:
        pids_in(note)
        assert sshd.drop_connections() > 0

    def work() -> None:
        with ssh.connect() as transport:
            folder = transport.send(files)
            threading.Thread(target=drop).start()
            transport.run([transport.interpreter, "hang.py", str(note)], cwd=folder)

    with pytest.raises(ProfileError) as caught:
        work()
    assert str(caught.value) == (
        "pi (device) was lost: the connection ended before its work did\n"
        "Hint: check its power, cable and network and run the command again; it removes the sent files by itself"
    )
    wait_until(lambda: not any(map(runs, pids_in(note))), "the program and its child ended")
    wait_until(lambda: ssh.left() == [], "the device removed its folder")


def test_a_network_that_falls_silent(ssh, sshd, files, tmp_path, monkeypatch):
    """Nothing ends the connection: the server's processes are only stopped, as behind a cable that was pulled."""
    monkeypatch.setattr(module, "ALIVE_S", 1)
    note = tmp_path / "pids"

    def fall_silent() -> None:
        pids_in(note)
        assert sshd.drop_connections(signal.SIGSTOP) > 0

    def work() -> None:
        with ssh.connect() as transport:
            folder = transport.send(files)
            threading.Thread(target=fall_silent).start()
            transport.run([transport.interpreter, "hang.py", str(note)], cwd=folder)

    with pytest.raises(ProfileError, match=r"pi \(device\) was lost"):
        work()
    assert ssh.left() != []
    sshd.drop_connections(signal.SIGCONT)
    wait_until(lambda: ssh.left() == [], "the device removed its folder when it noticed")
    wait_until(lambda: not any(map(runs, pids_in(note))), "the program and its child ended")


def test_a_device_that_is_lost_before_files_come(ssh, sshd, files):
    transport = ssh.connect()
    assert sshd.drop_connections() > 0
    with transport, pytest.raises(ProfileError, match=r"pi \(device\) was lost"):
        transport.send(files)  # leaving the block tells it no second time
    wait_until(lambda: ssh.left() == [], "the device removed its folder")


def test_a_device_that_is_lost_at_the_end_is_told(ssh, sshd, files):
    transport = ssh.connect()
    folder = transport.send(files)
    assert sshd.drop_connections() > 0
    with pytest.raises(ProfileError) as caught:
        transport.close()
    assert caught.value.message == f"pi (device) did not confirm that {folder.rpartition('/')[0]} was removed"
    wait_until(lambda: ssh.left() == [], "the device removed its folder")


def test_a_full_disk(ssh, small_disk, files):
    """The device's folder for temporary files is a disk of 2 MB."""
    small_disk(ssh.temporary)
    with ssh.connect() as transport:
        with pytest.raises(ProfileError) as caught:
            transport.send(files)
        folder = transport.send({"small": files["tell.py"]})
        assert transport.run(["cat", "small"], cwd=folder).returncode == 0
    assert caught.value.message.startswith(f"the disk of pi (device) is full: {ssh.temporary}/edgeadapt-")
    assert "does not take 6 files of 6.0 MB together (tar: " in caught.value.message
    assert caught.value.hint == "free some space there, or point TMPDIR on the device to a folder on another disk"
    assert ssh.left() == []


def test_a_shell_that_greets_everybody(tmp_path, monkeypatch, files):
    """What a login prints is not what a program prints."""
    greeting = 'ForceCommand echo "Welcome, ${USER:-you}"; echo edgeadapt is here; eval "$SSH_ORIGINAL_COMMAND"'
    server = Sshd(tmp_path / "server", settings=(greeting,))
    monkeypatch.setenv("EDGEADAPT_SSH_CONFIG", str(server.client_config))
    try:
        device = Device("pi", "a test", "cpu", transport="ssh", address="device", interpreter=sys.executable)
        with transports.connect(device) as transport:
            done = transport.run([transport.interpreter, "-c", "print(5)"], cwd=transport.send(files))
        assert done.stdout == "5\n"
        assert list(server.temporary.iterdir()) == []
    finally:
        server.stop()


def test_folders_of_a_device_that_went_down_are_removed_later(ssh):
    """Not those that have an owner, that another machine on the same disk made, or that are none of ours."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = os.uname().nodename
    owners = {"gone": (gone.pid, here), "used": (os.getpid(), here), "other": (gone.pid, f"not-{here}")}
    for name, (pid, node) in owners.items():
        (ssh.temporary / f"edgeadapt-{name}").mkdir()
        (ssh.temporary / f"edgeadapt-{name}" / f".keeper-{pid}-{node}").touch()
    (ssh.temporary / "edgeadapt-mine").mkdir()
    ssh.connect().close()
    assert ssh.left() == ["edgeadapt-mine", "edgeadapt-other", "edgeadapt-used"]


def test_an_emulated_python_on_the_device_is_noticed(ssh, sysroot, tmp_path):
    """`uname -m` of the system and of the interpreter differ, so its times mean nothing."""
    python = next((sysroot / "usr" / "bin").glob("python3.*[0-9]"))
    wrapper = tmp_path / "python-arm64"
    wrapper.write_text(f'#!/bin/sh\nexec qemu-aarch64-static -cpu cortex-a76 -L "{sysroot}" "{python}" "$@"\n')
    wrapper.chmod(0o755)
    with ssh.connect(interpreter=str(wrapper), machine="aarch64") as transport:
        assert (transport.machine, transport.emulated) == ("aarch64", True)


def test_every_program_shares_one_connection(ssh, sshd, files):
    with ssh.connect() as transport:
        folder = transport.send(files)
        before = sshd.connections()
        for number in range(3):
            done = transport.run(["echo", str(number)], cwd=folder)
            assert done.stdout == f"{number}\n"
        log = (sshd.folder / "log").read_text()
    assert len(before) > 0
    assert log.count("Accepted publickey") == 1


def test_the_device_is_a_value(ssh):
    """Connecting changes nothing of it."""
    before = replace(ssh.device)
    ssh.connect().close()
    assert ssh.device == before
