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
import shutil
from functools import partial
from pathlib import Path

from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling.transports import Transport, _failures
from edgeadapt.profiling.transports._shell import ShellTransport

CONNECT_S = 15
ALIVE_S = 10  # a network that fell silent is noticed after three times as long
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


class Ssh(ShellTransport):
    """One shared connection, and a folder on the machine that goes when it ends."""

    def __init__(self, device: Device) -> None:
        host, port = _parse(device)
        if shutil.which("ssh") is None:
            raise ProfileError(
                "there is no program ssh here", hint="install OpenSSH (Debian: apt install openssh-client)"
            )
        super().__init__(f"{device.name} ({device.address})")
        self._socket = Path(_SOCKETS, f"edgeadapt-ssh-{secrets.token_hex(8)}")
        config = os.environ.get("EDGEADAPT_SSH_CONFIG")
        self._target = (
            *(("-F", config) if config else ()),
            *("-S", str(self._socket)),
            *(("-p", port) if port else ()),
            host,
        )
        with self.closed_on_error():
            self.open(device, self._first, self._further, partial(_explain, where=self.where, host=host))

    def close(self) -> None:
        """End the keeper, which removes everything, and with it the connection."""
        try:
            super().close()
        finally:
            self._socket.unlink(missing_ok=True)  # ssh removes it itself, unless it had to be killed

    def _first(self, line: str) -> list[str]:
        """Return the program that opens the connection and runs a line there, and keeps both as long as it runs."""
        options = {
            "ControlMaster": "yes",
            "ControlPersist": "no",
            "ConnectTimeout": CONNECT_S,
            "ServerAliveInterval": ALIVE_S,
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
            f"where the device {device.name!r} is, is not known",
            hint="give --address user@host, or user@host:port; on the device itself, use --device cpu",
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
