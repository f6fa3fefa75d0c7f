"""A browser as a phone: Chromium with a phone's viewport and a slow processor, steered by the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import secrets
import socket
import struct
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgeadapt.profiling.web.chromium import Chromium

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


class Phone:
    """A phone's browser. It opens pages, is slow, and takes pictures of its screen."""

    def __init__(self, *, dark: bool = False, slower: float = 4, flags: tuple[str, ...] = ()) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.browser = Chromium("about:blank", flags=(f"--remote-debugging-port={self._port}", *flags))
        self._numbers = itertools.count(1)
        try:
            self._socket = _websocket(self._page())
            self.call("Emulation.setDeviceMetricsOverride", **PHONE)
            self.call("Emulation.setCPUThrottlingRate", rate=slower)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            self.call("Emulation.setEmulatedMedia", features=[scheme])
        except BaseException:
            self.browser.close()
            raise

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def text(self) -> str:
        """What the page says at present."""
        found = self.call("Runtime.evaluate", expression="document.body ? document.body.innerText : ''")
        return str(found["result"].get("value", ""))

    def wait_for(self, words: str, timeout_s: float = 120) -> str:
        end = time.monotonic() + timeout_s
        while words not in (text := self.text()):
            assert time.monotonic() < end, f"the page never said {words!r}, but: {text}"
            time.sleep(0.1)
        return text

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        _send(self._socket, json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(_receive(self._socket))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found

    def _page(self) -> str:
        """The address of the page's own socket, once the browser is up."""
        end = time.monotonic() + 60
        while True:
            with suppress(OSError):
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/json", timeout=5) as answer:
                    pages = [page for page in json.load(answer) if page["type"] == "page"]
                if pages:
                    return str(pages[0]["webSocketDebuggerUrl"])
            self.browser.check()
            assert time.monotonic() < end, "the browser did not start"
            time.sleep(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self.browser.close()


def _websocket(url: str) -> socket.socket:
    """Open a websocket (RFC 6455)."""
    host, _, path = url.removeprefix("ws://").partition("/")
    name, _, port = host.partition(":")
    link = socket.create_connection((name, int(port)), timeout=120)
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    wanted = {"Host": host, "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    lines = [f"GET /{path} HTTP/1.1", *(f"{k}: {v}" for k, v in wanted.items()), f"Sec-WebSocket-Key: {key}", "", ""]
    link.sendall("\r\n".join(lines).encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += _exactly(link, 1)
    assert b" 101 " in head, head
    return link


def _send(link: socket.socket, text: str) -> None:
    data, mask = text.encode(), os.urandom(4)
    size = len(data)
    head = bytes([0x81]) + (bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + struct.pack(">H", size))
    assert size < 2**16
    link.sendall(head + mask + bytes(byte ^ mask[place % 4] for place, byte in enumerate(data)))


def _receive(link: socket.socket) -> str:
    found = b""
    while True:
        first, second = _exactly(link, 2)
        size = second & 127
        if size == 126:
            (size,) = struct.unpack(">H", _exactly(link, 2))
        elif size == 127:
            (size,) = struct.unpack(">Q", _exactly(link, 8))
        data = _exactly(link, size)
        if first & 15 in (0, 1):
            found += data
            if first & 128:
                return found.decode()


def _exactly(link: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = link.recv(size - len(found))
        assert part, "the browser closed the connection"
        found += part
    return bytes(found)
