"""Any machine that one can log in to with OpenSSH, such as a Raspberry Pi or a Jetson.

The system's `ssh` is used as it is: ~/.ssh/config, agents, jump hosts and known hosts count (another file with
`EDGEADAPT_SSH_CONFIG`). One connection is opened and shared by all that follows. Nothing is ever asked: a device must
let this user in with a key. Files go as a tar stream, since sftp says only "Failure" where a disk is full, and small
systems have no sftp server.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.transports import Completed, Transport, _failures
from edgeadapt.profiling.transports._process import decoded, end_process, start_process
from edgeadapt.profiling.transports._python import check_machine, machine_of
from edgeadapt.profiling.transports._shell import Shell

CONNECT_S = 15
# A socket's path may have 104 bytes on some systems: not below a long TMPDIR. ssh lets only this user use it.
_SOCKETS = "/tmp"  # noqa: S108
_ADDRESS = re.compile(
    r"""
    ((?:[^@\s-][^@\s]*@)?)                  # user
    (?: \[([^\]\s]+)\]                      # host in brackets
      | ([^@\s:\[\]-][^@\s:\[\]]*)          # host
      | ([0-9a-fA-F:]*:[0-9a-fA-F:]*:[^\s\]]*)  # IPv6 address, which leaves no room for a port
    )
    (?::(\d+))?                             # port
    """,
    re.VERBOSE,
)
_COMMON = (
    "-T",
    *("-o", "BatchMode=yes"),
    *("-o", "LogLevel=ERROR"),
    # what a user's configuration may hold for people who log in
    *("-o", "RemoteCommand=none"),
    *("-o", "ClearAllForwardings=yes"),
    *("-o", "PermitLocalCommand=no"),
)

# What ssh says, what that means, and what to do. Its texts are not translated.
FAILURES = (
    (
        "Could not resolve hostname",
        "the host of {where} is unknown",
        "check the spelling of --address; a Raspberry Pi is often NAME.local, or use its IP address",
    ),
    (
        "Connection refused",
        "{where} refuses connections",
        "start the ssh server there (Raspberry Pi: sudo raspi-config, Interface Options), or give user@host:PORT",
    ),
    (
        r"timed out|No route to host|Network is unreachable|Host is down",
        "{where} does not answer",
        "check that it is on, in the same network, and that its address is right",
    ),
    (
        "HOST IDENTIFICATION HAS CHANGED",
        "{where} shows another host key than the known one: it was set up anew, or it is another machine",
        "if you know that it was set up anew: ssh-keygen -R {host}, then log in once by hand: ssh {host}",
    ),
    (
        "Host key verification failed|host key is known for",
        "the host key of {where} is not known yet",
        "log in once by hand and compare the fingerprint: ssh {host}",
    ),
    (
        "Permission denied|Too many authentication failures",
        "{where} does not let this user in with a key",
        "put your key there with `ssh-copy-id {host}`; a key with a passphrase must be in ssh-agent (ssh-add)",
    ),
    (
        r"Connection (closed|reset) by|kex_exchange_identification|banner",
        "what answers at {where} is no ssh server that wants to talk",
        "check the port in --address, and the server's log there",
    ),
)


def connect(device: Device) -> Transport:
    """Return a connection to the machine at `device.address`: user@host, user@host:port or a name of ~/.ssh/config.

    Raises:
        ProfileError: if it cannot be reached, or is not what the device's file says.
    """
    return Ssh(device)


class Ssh(Transport):
    """One shared connection, and a folder on the machine that goes when it ends."""

    def __init__(self, device: Device) -> None:
        host, port = _parse(device)
        if shutil.which("ssh") is None:
            raise ProfileError(
                "there is no program ssh here", hint="install OpenSSH (Debian: apt install openssh-client)"
            )
        where = f"{device.name} ({device.address})"
        self._where = where
        self._folders = 0
        self._socket = Path(_SOCKETS, f"edgeadapt-ssh-{secrets.token_hex(8)}")
        config = os.environ.get("EDGEADAPT_SSH_CONFIG")
        self._target = (
            *(("-F", config) if config else ()),
            *("-S", str(self._socket)),
            *(("-p", port) if port else ()),
            host,
        )
        self._shell: Shell | None = None
        try:
            self._shell = Shell(self._first, self._further, where, partial(_explain, where=where, host=host))
            self.interpreter = device.interpreter or "python3"
            self.machine = machine_of(self.interpreter, where, self._shell.probe)
            check_machine(device, self.machine, where)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        self.emulated = self.machine != self._shell.machine

    def send(self, files: Mapping[str, Path]) -> str:
        """Copy files as one tar stream."""
        _failures.check_files(files)
        assert self._shell is not None
        if not self._shell.alive:
            raise _failures.lost(self._where)
        self._folders += 1
        folder = f"{self._shell.folder}/{self._folders}"
        quoted = shlex.quote(folder)
        unpack = f"LC_ALL=C; export LC_ALL; mkdir {quoted} && exec tar -xf - -C {quoted}"
        with tempfile.TemporaryFile() as said:
            child = start_process(self._further(f"exec sh -c {shlex.quote(unpack)}"), stderr=said)
            try:
                _write_tar(child, files)
                child.wait()
            finally:
                end_process(child)
            said.seek(0)
            complaints = decoded(said.read())
        if child.returncode != 0:
            self._shell.require_alive()
            self._shell.command(f"rm -rf {quoted}")
            raise _failures.not_written(files, folder, self._where, complaints)
        return folder

    def run(self, arguments: Sequence[str], *, cwd: str, stdin: str = "", timeout_s: float | None = None) -> Completed:
        """Run a program over the shared connection."""
        assert self._shell is not None
        return self._shell.run(arguments, cwd=cwd, stdin=stdin, timeout_s=timeout_s)

    def close(self) -> None:
        """End the keeper, which removes everything, and with it the connection."""
        shell, self._shell = self._shell, None
        removed = shell is None or shell.close()
        self._socket.unlink(missing_ok=True)  # ssh removes it itself, unless it had to be killed
        if shell is not None and not removed:
            raise _failures.left_behind(shell.folder, self._where)

    def _first(self, line: str) -> list[str]:
        """Return the program that opens the connection and runs a line there, and keeps both as long as it runs."""
        options = {
            "ControlMaster": "yes",
            "ControlPersist": "no",
            "ConnectTimeout": CONNECT_S,
            # a lost network is noticed after half a minute, also when nothing is said
            "ServerAliveInterval": 10,
            "ServerAliveCountMax": 3,
        }
        return ["ssh", *_COMMON, *(f"-o{name}={value}" for name, value in options.items()), *self._target, line]

    def _further(self, line: str) -> list[str]:
        """Return the program that runs a line over the open connection; without one it fails and opens none."""
        return ["ssh", *_COMMON, "-oControlMaster=no", "-oProxyCommand=false", *self._target, line]


def _parse(device: Device) -> tuple[str, str | None]:
    """Return the host for ssh's command line, with its user, and the port."""
    address = device.address
    if address is None:
        raise ProfileError(
            f"where the device {device.name!r} is, is not known", hint="give --address user@host, or user@host:port"
        )
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ProfileError(f"{address!r} is no address for ssh", hint="give --address user@host, or user@host:port")
    user, *hosts, port = found.groups()
    return user + next(filter(None, hosts)), port


def _explain(text: str, *, where: str, host: str) -> ProfileError:
    """Return the error for what ssh said when it did not connect."""
    reason = _failures.reason_in(text)
    for pattern, message, hint in FAILURES:
        if re.search(pattern, text):
            return ProfileError(f"{message.format(where=where)} ({reason})", hint=hint.format(host=host))
    return ProfileError(f"ssh does not reach {where}: {reason}", hint=f"try by hand: ssh {host}")


def _write_tar(child: subprocess.Popen[bytes], files: Mapping[str, Path]) -> None:
    """Write files to a program as a tar stream; a program that ended before its end will say why."""
    assert child.stdin is not None
    # Two names of one file are two files there: `dereference` keeps tarfile from making the second one a link.
    with (
        suppress(BrokenPipeError),
        tarfile.open(fileobj=child.stdin, mode="w|", format=tarfile.GNU_FORMAT, dereference=True) as archive,
    ):
        for name, path in files.items():
            member = archive.gettarinfo(str(path), name)
            member.mode, member.uid, member.gid, member.uname, member.gname = 0o644, 0, 0, "", ""
            with path.open("rb") as content:
                archive.addfile(member, content)
    with suppress(BrokenPipeError):
        child.stdin.close()
