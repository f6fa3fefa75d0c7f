"""A real OpenSSH server on a high port of this machine, with keys, configuration and users of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import psutil

from tests.transports.waiting import wait_until

PROGRAM = shutil.which("sshd") or "/usr/sbin/sshd"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Sshd:
    """A server that lets this user in with one key; `temporary` is where the device keeps temporary files.

    client_config: a file for `ssh -F` that knows the key, and the server as host "device"
    """

    def __init__(self, folder: Path, *, settings: tuple[str, ...] = ()) -> None:
        folder.mkdir()
        self.folder = folder
        self.port = free_port()
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.known_hosts = folder / "known_hosts"
        self.client_config = folder / "client_config"
        for name in ("host", "user", "other"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        self.know("host.pub")
        self.configure_client()
        lines = (
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {folder}/host",
            f"AuthorizedKeysFile {folder}/authorized_keys",
            f"PidFile {folder}/sshd.pid",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            f"SetEnv TMPDIR={self.temporary}",
            *settings,
        )
        (folder / "sshd_config").write_text("\n".join(lines) + "\n")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # what the system's service would make
        self._log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [PROGRAM, "-D", "-e", "-f", str(folder / "sshd_config")],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        wait_until(self._answers, f"sshd answers: {(folder / 'log').read_text()}")

    @property
    def user(self) -> str:
        return getpass.getuser()

    def know(self, key: str) -> None:
        """Make a host key the one that the client expects."""
        kind, public, *_ = (self.folder / key).read_text().split()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {kind} {public}\n")

    def configure_client(self, key: str = "user") -> None:
        lines = (
            "Host device",
            f"    Port {self.port}",
            "    HostName 127.0.0.1",
            "Host *",
            f"    UserKnownHostsFile {self.known_hosts}",
            "    GlobalKnownHostsFile /dev/null",
            f"    IdentityFile {self.folder}/{key}",
            "    IdentitiesOnly yes",
            "    IdentityAgent none",
        )
        self.client_config.write_text("\n".join(lines) + "\n")

    def drop_connections(self, how: signal.Signals = signal.SIGKILL) -> int:
        """Kill (or stop) the processes that serve connections, but not what they started; return how many."""
        found = [child for child in self._descendants() if child.name() in ("sshd", "sshd-session")]
        for child in found:
            child.send_signal(how)
        return len(found)

    def connections(self) -> list[int]:
        return [child.pid for child in self._descendants()]

    def stop(self) -> None:
        left = self._descendants()
        self.process.terminate()
        self.process.wait()
        for child in left:  # only the server's own
            if child.is_running() and child.name() in ("sshd", "sshd-session"):
                child.kill()
        self._log.close()

    def _descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True
