"""The device's side of adb, for tests: what the real client needs to believe that a phone is there.

It speaks adb's transport (CNXN, AUTH with a checked RSA signature, OPEN, OKAY, WRTE, CLSE), the services
`shell,v2` (outputs apart, exit status, input and its end), `shell`, and `sync` version 1 (STAT, SEND, RECV, LIST).
After system/core/adb/protocol.txt, SYNC.TXT and shell_protocol.h of Android. Commands run in a shell of this machine
in a session of their own, and get SIGHUP when their stream ends early, as Android's daemon does it.

It is no phone: it shows that our side talks rightly to adb, and nothing about a phone's speed.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import Queue

CNXN, AUTH, OPEN, OKAY, WRTE, CLSE = (
    int.from_bytes(name, "little") for name in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"WRTE", b"CLSE")
)
VERSION, MAX_DATA = 0x01000001, 256 * 1024
TOKEN, SIGNATURE, PUBLIC_KEY = 1, 2, 3
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
# DER of "what follows is a SHA-1" (RFC 8017, 9.2)
SHA1_PREFIX = bytes.fromhex("3021300906052b0e03021a05000414")


class Adbd:
    """A device at 127.0.0.1:port.

    environment: of the commands that run there; shell: how a line is run
    trusts: whether somebody taps "Allow" when a computer shows an unknown key
    features: what the device says that it can
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        shell: tuple[str, ...] = ("sh", "-c"),
        trusts: bool = True,
        features: str = "cmd,shell_v2",
    ) -> None:
        self.environment = dict(environment)
        self.shell = shell
        self.trusts = trusts
        self.features = features
        self.keys: set[tuple[int, int]] = set()
        self._connections: list[_Connection] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def drop_connections(self) -> int:
        """Let the cable be pulled; return how many connections were cut."""
        found, self._connections = self._connections, []
        for connection in found:
            connection.cut()
        return len(found)

    def stop(self) -> None:
        # a thread that waits in accept is not woken by close alone
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_connections()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection = _Connection(self, self._listener.accept()[0])
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()


class _Connection:
    """One computer that is connected."""

    def __init__(self, device: Adbd, wire: socket.socket) -> None:
        self.device = device
        self._wire = wire
        self._lock = threading.Lock()
        self._streams: dict[int, _Stream] = {}
        self._token = secrets.token_bytes(20)
        self._accepted = False
        self._next = 1

    def serve(self) -> None:
        with suppress(OSError, EOFError):
            while True:
                command, first, second, size, _, magic = struct.unpack("<6I", _exactly(self._wire, 24))
                if magic != command ^ 0xFFFFFFFF:
                    raise EOFError
                self._handle(command, first, second, _exactly(self._wire, size))
        self.cut()

    def cut(self) -> None:
        with suppress(OSError):
            self._wire.shutdown(socket.SHUT_RDWR)
        self._wire.close()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.end()

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        head = struct.pack("<6I", command, first, second, len(data), sum(data) & 0xFFFFFFFF, command ^ 0xFFFFFFFF)
        with self._lock:
            self._wire.sendall(head + data)

    def _handle(self, command: int, first: int, second: int, data: bytes) -> None:
        if command == CNXN:
            self.send(AUTH, TOKEN, 0, self._token)
        elif command == AUTH:
            self._check(first, data)
        elif not self._accepted:
            raise EOFError
        elif command == OPEN:
            self._open(first, data.rstrip(b"\0").decode())
        elif second in self._streams:
            self._streams[second].handle(command, data)
            if command == CLSE:
                del self._streams[second]

    def _check(self, kind: int, data: bytes) -> None:
        if kind == SIGNATURE:
            self._accepted = any(_signs(key, data, self._token) for key in self.device.keys)
            if not self._accepted:
                self.send(AUTH, TOKEN, 0, self._token)  # the computer then offers its next key
        elif kind == PUBLIC_KEY and self.device.trusts:
            self.device.keys.add(_public_key(data))
            self._accepted = True
        if self._accepted:
            product = "ro.product.name=mini;ro.product.model=Mini;ro.product.device=mini"
            banner = f"device::{product};features={self.device.features}"
            self.send(CNXN, VERSION, MAX_DATA, banner.encode())

    def _open(self, remote: int, service: str) -> None:
        local, self._next = self._next, self._next + 1
        name, _, argument = service.partition(":")
        if name.split(",")[0] == "shell":
            stream: _Stream = _Shell(self, local, remote, argument, framed="v2" in name.split(","))
        elif name == "sync":
            stream = _Sync(self, local, remote)
        else:
            self.send(CLSE, 0, remote)
            return
        self._streams[local] = stream
        self.send(OKAY, local, remote)
        stream.start()


class _Stream:
    """One service: bytes in both directions, one unacknowledged packet at a time."""

    def __init__(self, connection: _Connection, local: int, remote: int) -> None:
        self.connection = connection
        self._local, self._remote = local, remote
        self._ready = threading.Semaphore(1)
        self._incoming: Queue[bytes | None] = Queue()
        self._rest = b""
        self._ended = False
        self._writing = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._guarded, daemon=True).start()

    def serve(self) -> None:
        raise NotImplementedError

    def handle(self, command: int, data: bytes) -> None:
        if command == OKAY:
            self._ready.release()
        elif command == WRTE:
            self._incoming.put(data)
            self.connection.send(OKAY, self._local, self._remote)
        elif command == CLSE:
            self.end()

    def end(self) -> None:
        self._ended = True
        self._incoming.put(None)
        self._ready.release()

    def write(self, data: bytes) -> None:
        with self._writing:
            for start in range(0, len(data), MAX_DATA):
                self._ready.acquire()
                if self._ended:
                    raise EOFError
                self.connection.send(WRTE, self._local, self._remote, data[start : start + MAX_DATA])

    def read(self, size: int) -> bytes:
        while len(self._rest) < size:
            more = self._incoming.get()
            if more is None:
                raise EOFError
            self._rest += more
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    def _guarded(self) -> None:
        with suppress(OSError, EOFError):
            self.serve()
            self._ready.acquire()  # the last packet has arrived
            if not self._ended:
                self.connection.send(CLSE, self._local, self._remote)


class _Shell(_Stream):
    """A command with its streams: apart and with an exit status if `framed`, else as one."""

    def __init__(self, connection: _Connection, local: int, remote: int, line: str, *, framed: bool) -> None:
        super().__init__(connection, local, remote)
        self._line, self._framed = line, framed
        self._child: subprocess.Popen[bytes] | None = None

    def serve(self) -> None:
        device = self.connection.device
        child = subprocess.Popen(
            [*device.shell, self._line],
            env=device.environment,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if self._framed else subprocess.STDOUT,
            start_new_session=True,
        )
        self._child = child
        if self._ended:
            self._hang_up()
        threading.Thread(target=self._feed, daemon=True).start()
        outputs = [(STDOUT, child.stdout), (STDERR, child.stderr)]
        pumps = [threading.Thread(target=self._pump, args=item) for item in outputs if item[1] is not None]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        status = child.wait()
        if self._framed:
            self.write(_frame(EXIT, bytes([status if status >= 0 else 128 - status])))

    def end(self) -> None:
        super().end()
        if self._child is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        assert self._child is not None
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGHUP)
        with suppress(OSError):
            assert self._child.stdin is not None
            self._child.stdin.close()

    def _feed(self) -> None:
        """Hand input on until it ends."""
        assert self._child is not None
        assert self._child.stdin is not None
        with suppress(OSError, EOFError, ValueError), self._child.stdin as target:
            while True:
                if not self._framed:
                    target.write(self.read(1))
                else:
                    kind, size = struct.unpack("<BI", self.read(5))
                    data = self.read(size)
                    if kind == CLOSE_STDIN:
                        return
                    if kind == STDIN:
                        target.write(data)
                target.flush()

    def _pump(self, kind: int, source: object) -> None:
        with suppress(OSError, EOFError, ValueError):
            while data := os.read(source.fileno(), 32768):  # type: ignore[attr-defined]
                self.write(_frame(kind, data) if self._framed else data)
        source.close()  # type: ignore[attr-defined]  # who still writes gets SIGPIPE


class _Sync(_Stream):
    """Files, version 1 of the protocol."""

    def serve(self) -> None:
        while True:
            kind, size = struct.unpack("<4sI", self.read(8))
            argument = self.read(size).decode()
            if kind == b"QUIT":
                return
            try:
                {b"STAT": self._stat, b"SEND": self._receive, b"RECV": self._hand_out, b"LIST": self._list}[kind](
                    argument
                )
            except OSError as error:
                self._fail(error)

    def _stat(self, path: str) -> None:
        try:
            found = os.lstat(path)
            self.write(struct.pack("<4s3I", b"STAT", found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime)))
        except OSError:
            self.write(struct.pack("<4s3I", b"STAT", 0, 0, 0))

    def _receive(self, argument: str) -> None:
        path, _, mode = argument.rpartition(",")
        problem = ""
        try:
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, int(mode) & 0o777)
        except OSError as error:
            problem, target = f"couldn't create file: {error.strerror}", -1
        while True:  # what is still to come is read also after a failure
            kind, size = struct.unpack("<4sI", self.read(8))
            if kind == b"DONE":
                break
            data = self.read(size)
            while data and not problem:
                try:
                    data = data[os.write(target, data) :]
                except OSError as error:
                    problem = f"write failed: {error.strerror}"
        if target >= 0:
            os.close(target)
        if problem:
            with suppress(OSError):
                Path(path).unlink()
            self.write(struct.pack("<4sI", b"FAIL", len(problem)) + problem.encode())
        else:
            os.utime(path, (size, size))
            self.write(struct.pack("<4sI", b"OKAY", 0))

    def _hand_out(self, path: str) -> None:
        data = Path(path).read_bytes()
        for start in range(0, len(data), 65536):
            piece = data[start : start + 65536]
            self.write(struct.pack("<4sI", b"DATA", len(piece)) + piece)
        self.write(struct.pack("<4sI", b"DONE", 0))

    def _list(self, path: str) -> None:
        for item in os.scandir(path):
            found, name = item.stat(follow_symlinks=False), item.name.encode()
            self.write(
                struct.pack("<4s4I", b"DENT", found.st_mode, found.st_size, int(found.st_mtime), len(name)) + name
            )
        self.write(struct.pack("<4s4I", b"DONE", 0, 0, 0, 0))

    def _fail(self, error: OSError) -> None:
        text = (error.strerror or str(error)).encode()
        self.write(struct.pack("<4sI", b"FAIL", len(text)) + text)


def _frame(kind: int, data: bytes) -> bytes:
    return struct.pack("<BI", kind, len(data)) + data


def _exactly(wire: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = wire.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _public_key(data: bytes) -> tuple[int, int]:
    """Return modulus and exponent of a key as adb sends it: base64 of Android's struct RSAPublicKey, and a name."""
    raw = base64.b64decode(data.split(b" ")[0].rstrip(b"\0"))
    (words,) = struct.unpack_from("<I", raw)
    modulus = int.from_bytes(raw[8 : 8 + 4 * words], "little")
    (exponent,) = struct.unpack_from("<I", raw, 8 + 8 * words)
    return modulus, exponent


def _signs(key: tuple[int, int], signature: bytes, token: bytes) -> bool:
    """Whether a PKCS #1 v1.5 signature over the token, taken as a SHA-1, is by a key."""
    modulus, exponent = key
    size = (modulus.bit_length() + 7) // 8
    assert len(token) == hashlib.sha1(usedforsecurity=False).digest_size
    end = b"\0" + SHA1_PREFIX + token
    wanted = b"\0\1" + b"\xff" * (size - 2 - len(end)) + end
    return pow(int.from_bytes(signature, "big"), exponent, modulus).to_bytes(size, "big") == wanted
