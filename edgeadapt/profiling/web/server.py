"""The HTTP server behind the page that measures. It knows one job, one visitor, and a token that nobody can guess.

    GET  /TOKEN/                   the page
    POST /TOKEN/claim              the first visitor gets a secret CLIENT, every other one 409
    GET  /TOKEN/CLIENT/job/...     the job's files;  ort/... ONNX Runtime's;  device/... the measuring program
    GET  /TOKEN/CLIENT/memory      this visitor's memory as its operating system says it, null where that is elsewhere
    GET  /TOKEN/CLIENT/alive       a stream that stays open: when it breaks, the visitor is gone
    POST /TOKEN/CLIENT/progress    how far it is;  gone: the page was closed;  outcome: the samples, or what went wrong

Everything else is refused. The page is isolated from others (COOP, COEP), which browsers ask for before they give it
threads; plain http is safe enough for that on the machine itself only.
"""

from __future__ import annotations

import hmac
import json
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from socketserver import TCPServer
from types import TracebackType
from typing import Any, Self

from edgeadapt.errors import ProfileError
from edgeadapt.profiling.web.visit import Visit

_DEVICE_SIDE = Path(__file__).parents[1] / "device_side"
_PROGRAM = ("web_worker.mjs", "measure.mjs", "engine.mjs", "tensors.mjs")
_TYPES = {".html": "text/html; charset=utf-8", ".mjs": "text/javascript", ".wasm": "application/wasm"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_MAX_BODY_BYTES = 2**26
_BEAT_S = 0.5


class Server:
    """Serves one job to one visitor until it is closed.

    visit: what is known of the visitor; url: where it begins
    """

    def __init__(
        self,
        folder: Path,
        runtime_files: Mapping[str, Path],
        *,
        kind: str,
        title: str,
        listen: str = "127.0.0.1",
        memory: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        """Begin to serve.

        Args:
            folder: the job's.
            runtime_files: ONNX Runtime's files by name.
            kind: what is measured: "speed", "memory" or "checks".
            title: the page's, for people.
            listen: the address of this machine that is listened on; the port is any free one.
            memory: returns the visitor's memory, where this machine can see it.

        Raises:
            ProfileError: if that address is not this machine's.
        """
        self.visit = Visit()
        self.kind, self.title, self.memory = kind, title, memory
        self.token = secrets.token_urlsafe(18)
        self.files = _files(folder, runtime_files)
        self._http = _listen(listen, self)
        port = self._http.server_address[1]
        self.port = int(port)
        self.url = f"http://{f'[{listen}]' if ':' in listen else listen}:{port}/{self.token}/"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def close(self, reason: str = "the measurement is over") -> None:
        """Stop serving; a page that still waits is told why."""
        if not self.visit.over:
            self.visit.stop(reason, within_s=3 * _BEAT_S)
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(getattr(error, "message", None) or "the command was stopped")


def _files(folder: Path, runtime_files: Mapping[str, Path]) -> dict[str, Path]:
    """Return everything that may be asked for, by its path below the visitor's own."""
    job = {f"job/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*") if path.is_file()}
    runtime = {f"ort/{name}": path for name, path in runtime_files.items()}
    program = {f"device/{name}": _DEVICE_SIDE / name for name in _PROGRAM}
    return {**job, **runtime, **program}


def _listen(address: str, owner: Server) -> _Http:
    try:
        if not address or ip_address(address).is_unspecified:
            raise ProfileError(
                f"listening on {address!r} would serve the model on every network of this machine",
                hint="name the one address at which the phone reaches this machine, as `ip address` shows it",
            )
        return _Http(address, owner)
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"this machine cannot listen on {address}: {getattr(error, 'strerror', None) or error}",
            hint="give an address of this machine, as `ip address` shows them, or leave --listen out",
        ) from error


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: str, owner: Server) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.owner = owner
        super().__init__((address, 0), _Handler)

    def server_bind(self) -> None:
        """Bind without the base class's look-up of this machine's name, which can take long."""
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a visitor that broke a connection; what is a bug here keeps its traceback."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edgeadapt", ""
    server: _Http
    timeout = 120

    @property
    def owner(self) -> Server:
        """The server's own data."""
        return self.server.owner

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing: a request is no news."""

    def do_GET(self) -> None:
        """Answer with a file, the page, or what is known."""
        path = self._own_path()
        if path is None:
            return
        if path == "":
            self._send_file(_DEVICE_SIDE / "page.html")
        elif (inner := self._client_path(path)) is None:
            return
        elif inner == "alive":
            self._stream()
        elif inner == "memory":
            self._send_json(self.owner.memory())
        elif inner in self.owner.files:
            self.owner.visit.seen()
            self._send_file(self.owner.files[inner])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "There is no such file.")

    def do_POST(self) -> None:
        """Take what the visitor says."""
        path = self._own_path()
        if path is None:
            return
        body = self._body()
        if body is None:
            return
        if path == "claim":
            self._claim()
        elif (inner := self._client_path(path)) is not None:
            self._take(inner, body)

    def _claim(self) -> None:
        client = self.owner.visit.claim(self.headers.get("User-Agent", ""))
        if client is None:
            why = "This address is for one visit, and that has begun. Run the command again."
            self._refuse(HTTPStatus.CONFLICT, why)
        else:
            self._send_json({"client": client, "kind": self.owner.kind, "title": self.owner.title})

    def _take(self, what: str, body: dict[str, Any]) -> None:
        visit = self.owner.visit
        if what == "progress" and isinstance(body.get("progress"), dict) and isinstance(body.get("partial"), dict):
            visit.tell(body["progress"], body["partial"])
        elif what == "outcome" and (isinstance(body.get("result"), dict) or isinstance(body.get("error"), dict)):
            visit.end(body)
        elif what == "gone":
            visit.leave()
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, "This is not what the page says.")
            return
        self._send_json(None)

    def _own_path(self) -> str | None:
        """Return the path behind the token; without the right one the request is refused."""
        token, _, rest = self.path.partition("?")[0].lstrip("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.owner.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "This address is not known. Run the command again.")
            return None
        if self.owner.visit.over:
            self._refuse(HTTPStatus.GONE, "This address was for one visit, and that is over. Run the command again.")
            return None
        return rest

    def _client_path(self, path: str) -> str | None:
        client, _, rest = path.partition("/")
        known = self.owner.visit.client
        if known and hmac.compare_digest(client.encode(), known.encode()):
            return rest
        self._refuse(HTTPStatus.FORBIDDEN, "Only the visitor may ask for this.")
        return None

    def _body(self) -> dict[str, Any] | None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > _MAX_BODY_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "This is too large.")
            return None
        text = self.rfile.read(int(length))
        try:
            found = json.loads(text) if text else {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self._refuse(HTTPStatus.BAD_REQUEST, "This is not JSON.")
            return None
        return found

    def _stream(self) -> None:
        """Send a sign of life again and again, at last why it ends."""
        visit = self.owner.visit
        self.close_connection = True
        self._begin(HTTPStatus.OK, "text/event-stream", None)
        visit.stream(1)
        try:
            while not visit.over:
                self.wfile.write(b":\n\n")
                self.wfile.flush()
                threading.Event().wait(_BEAT_S)
            if visit.stopped is not None:
                self.wfile.write(f"event: stop\ndata: {' '.join(visit.stopped.split())}\n\n".encode())
        except OSError:
            pass
        finally:
            visit.stream(-1)

    def _send_file(self, path: Path) -> None:
        with path.open("rb") as file:
            self._begin(HTTPStatus.OK, _TYPES.get(path.suffix, "application/octet-stream"), path.stat().st_size)
            with suppress(OSError):  # a visitor that goes away in the middle is noticed elsewhere
                shutil.copyfileobj(file, self.wfile, 2**20)

    def _send_json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, "application/json", json.dumps(value).encode())

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True  # what it sent may not have been read
        self._send(status, "text/plain; charset=utf-8", why.encode())

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self._begin(status, kind, len(data))
        with suppress(OSError):
            self.wfile.write(data)

    def _begin(self, status: HTTPStatus, kind: str, length: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        with suppress(OSError):
            self.end_headers()
