"""The device's side of `adb reverse`, beside what tests/transports/mini_adbd.py knows, and a browser that `am` opens.

After Android's adb/adb_listeners.cpp and socket protocol: the computer asks for `reverse:forward:tcp:A;tcp:B`, the
device answers OKAY, listens on A, and opens a stream `tcp:B` to the computer for each connection. The device has a
loopback of its own here, 127.0.0.2.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.transports import mini_adbd as adb

LOOPBACK = "127.0.0.2"


def device(folder: Path, environment: Mapping[str, str]) -> Any:
    """Return a device whose `am` writes what it is told to open to `folder`/opened."""
    programs = folder / "bin"
    programs.mkdir()
    am = programs / "am"
    am.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > "{folder}/opened.tmp"\nmv "{folder}/opened.tmp" "{folder}/opened"\n'
    )
    am.chmod(0o755)
    return _Phone({**environment, "PATH": f"{programs}:{environment['PATH']}"})


class _Phone(adb.Adbd):
    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection = _Connection(self, self._listener.accept()[0])
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()


class _Connection(adb._Connection):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._listening: dict[str, socket.socket] = {}

    def cut(self) -> None:
        super().cut()
        for listener in self._listening.values():
            _stop(listener)

    def _handle(self, command: int, first: int, second: int, data: bytes) -> None:
        stream = self._streams.get(second)
        if command == adb.OKAY and isinstance(stream, _Tunnel):
            stream.remote = first
        super()._handle(command, first, second, data)

    def _open(self, remote: int, service: str) -> None:
        kind, _, argument = service.partition(":")
        if kind != "reverse":
            super()._open(remote, service)
            return
        local, self._next = self._next, self._next + 1
        self.send(adb.OKAY, local, remote)
        command, _, ports = argument.partition(":")
        here, _, there = ports.partition(";")
        if command == "forward":
            self._listen(here, there)
        elif command == "killforward" and here in self._listening:
            _stop(self._listening.pop(here))
        else:
            self.send(adb.WRTE, local, remote, b"FAIL0009not found")
            self.send(adb.CLSE, local, remote)
            return
        self.send(adb.WRTE, local, remote, b"OKAY")
        self.send(adb.CLSE, local, remote)

    def _listen(self, here: str, there: str) -> None:
        listener = socket.create_server((LOOPBACK, int(here.removeprefix("tcp:"))))
        self._listening[here] = listener

        def accept() -> None:
            with suppress(OSError):
                while True:
                    _Tunnel(self, listener.accept()[0]).open(there)

        threading.Thread(target=accept, daemon=True).start()

    def new_stream(self, stream: Any) -> int:
        local, self._next = self._next, self._next + 1
        self._streams[local] = stream
        return local


class _Tunnel:
    """One connection of a program on the device to a port of the computer."""

    def __init__(self, connection: _Connection, wire: socket.socket) -> None:
        self._connection, self._wire = connection, wire
        self._ready = threading.Semaphore(0)
        self.remote = 0
        self._local = connection.new_stream(self)

    def open(self, service: str) -> None:
        self._connection.send(adb.OPEN, self._local, 0, service.encode() + b"\0")
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(OSError):
            while True:
                self._ready.acquire()  # the computer has taken what came before
                data = self._wire.recv(adb.MAX_DATA)
                if not data:
                    break
                self._connection.send(adb.WRTE, self._local, self.remote, data)
        with suppress(OSError):
            self._connection.send(adb.CLSE, self._local, self.remote)

    def handle(self, command: int, data: bytes) -> None:
        if command == adb.OKAY:
            self._ready.release()
        elif command == adb.WRTE:
            with suppress(OSError):
                self._wire.sendall(data)
            self._connection.send(adb.OKAY, self._local, self.remote)
        else:
            self.end()

    def end(self) -> None:
        _stop(self._wire)


def _stop(wire: socket.socket) -> None:
    with suppress(OSError):
        wire.shutdown(socket.SHUT_RDWR)
    wire.close()
