"""Who may ask the measuring server for what; no browser is needed for that."""

from __future__ import annotations

import http.client
import json
import socket
from urllib.parse import quote, urlsplit

import pytest

from edgeadapt.errors import ProfileError, UnfinishedError
from edgeadapt.profiling.web import visit
from edgeadapt.profiling.web.server import Server


@pytest.fixture
def served(tmp_path):
    """A server over a job of two files, and a file beside it that is nobody's business."""
    (tmp_path / "secret.txt").write_text("secret")
    job = tmp_path / "job"
    (job / "model").mkdir(parents=True)
    (job / "job.json").write_text("{}")
    (job / "model" / "weights.bin").write_bytes(b"abc")
    (job / "ort.wasm").write_bytes(b"\0asm")
    with Server(job, {"ort.wasm": job / "ort.wasm"}, kind="speed", title="a title") as server:
        yield server


def ask(server, method, path, body=None, token=None):
    """Return status, headers and content of an answer; `path` comes behind the token."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    link.request(method, f"/{server.token if token is None else token}/{path}", body)
    answer = link.getresponse()
    found = answer.status, answer.headers, answer.read()
    link.close()
    return found


def claimed(server):
    status, _, data = ask(server, "POST", "claim")
    assert status == 200
    return json.loads(data)


def waited(server, timeout_s=5, told=None):
    told = [] if told is None else told
    return server.visit.wait(timeout_s, where="the phone", watch=lambda: None, progress=told.append)


def test_the_visitor_gets_the_page_the_job_and_the_runtime_isolated_from_other_pages(served):
    status, headers, data = ask(served, "GET", "")
    assert (status, b"<!doctype html>" in data) == (200, True)
    wanted = {
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Embedder-Policy": "require-corp",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }
    assert {name: headers[name] for name in wanted} == wanted
    visitor = claimed(served)
    assert (visitor["kind"], visitor["title"]) == ("speed", "a title")
    for path, kind, content in (
        ("job/model/weights.bin", "application/octet-stream", b"abc"),
        ("ort/ort.wasm", "application/wasm", b"\0asm"),
    ):
        status, headers, data = ask(served, "GET", f"{visitor['client']}/{path}")
        assert (status, headers["Content-Type"], data) == (200, kind, content)
    status, headers, data = ask(served, "GET", f"{visitor['client']}/device/measure.mjs")
    assert (status, headers["Content-Type"], b"export async function measure" in data) == (200, "text/javascript", True)
    assert ask(served, "GET", f"{visitor['client']}/memory")[2] == b"null"


@pytest.mark.parametrize(
    "path",
    ["job/../../secret.txt", "job/%2e%2e/%2e%2e/secret.txt", "job/", "job", "", "device/runner.py", "ort/job.json"],
)
def test_nothing_else_of_this_machine_is_served(served, path):
    client = claimed(served)["client"]
    assert ask(served, "GET", f"{client}/{path}")[0] == 404


@pytest.mark.parametrize("token", ["", "index.html", "x", "A" * 24, "ÄÖ%"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_the_token_everything_is_refused(served, method, token):
    status, _, data = ask(served, method, "claim", token=quote(token))
    assert (status, data) == (403, b"This address is not known. Run the command again.")
    assert served.visit.client == ""


def test_before_and_beside_the_visitor_nobody_gets_the_job(served):
    assert ask(served, "GET", "job.json", token="job")[0] == 403
    assert ask(served, "GET", "job/job.json")[0] == 403
    client = claimed(served)["client"]
    for path in ("job/job.json", f"{client[:-1]}x/job/job.json"):
        assert ask(served, "GET", path)[0] == 403
    assert ask(served, "POST", "progress", "{}")[0] == 403


def test_a_second_visitor_is_refused(served):
    claimed(served)
    status, _, data = ask(served, "POST", "claim")
    assert (status, data.decode()) == (409, "This address is for one visit, and that has begun. Run the command again.")


def test_the_first_outcome_counts_and_the_address_is_over_then(served):
    client = claimed(served)["client"]
    progress = {"progress": {"stage": "runs", "done": 1, "total": 3}, "partial": {}}
    ask(served, "POST", f"{client}/progress", json.dumps(progress))
    told = []
    with pytest.raises(UnfinishedError, match=r"was not done within 0\.3 s"):
        waited(served, 0.3, told)
    assert told == ["runs (2 of 3)"]
    assert ask(served, "POST", f"{client}/outcome", json.dumps({"result": {"latency_s": [1.0]}}))[0] == 200
    assert waited(served) == {"latency_s": [1.0]}
    for method, path in (("GET", ""), ("POST", "claim"), ("GET", f"{client}/job/job.json")):
        assert ask(served, method, path)[0] == 410


def test_every_stage_is_told_in_its_order_however_fast_they_come(served):
    client = claimed(served)["client"]
    for stage, done, total in (("open", 0, 1), ("open", 0, 1), ("runs", 0, 2), ("runs", "x", 2), ("done", 1, None)):
        progress = {"stage": stage, "done": done, "total": total}
        ask(served, "POST", f"{client}/progress", json.dumps({"progress": progress, "partial": {}}))
    ask(served, "POST", f"{client}/outcome", json.dumps({"result": {"latency_s": [1.0]}}))
    told = []
    assert waited(served, 5, told) == {"latency_s": [1.0]}
    assert told == ["open", "runs (1 of 2)", "runs", "done"]


@pytest.mark.parametrize(
    ("what", "body", "status"),
    [
        ("outcome", "{}", 400),
        ("outcome", '{"result": 3}', 400),
        ("progress", '{"progress": {}}', 400),
        ("outcome", "[]", 400),
        ("outcome", "{", 400),
        ("steal", "{}", 400),
    ],
)
def test_what_the_page_would_not_say_is_refused(served, what, body, status):
    client = claimed(served)["client"]
    assert ask(served, "POST", f"{client}/{what}", body)[0] == status
    assert not served.visit.over


def test_a_body_that_is_too_large_is_not_read(served):
    client = claimed(served)["client"]
    link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    link.putrequest("POST", f"/{served.token}/{client}/outcome")
    link.putheader("Content-Length", str(2**40))
    link.endheaders()
    assert link.getresponse().status == 413
    link.close()


def test_an_error_of_the_page_comes_with_what_was_measured(served):
    client = claimed(served)["client"]
    error = {"error": {"message": "out of memory", "hint": "use a smaller model"}, "partial": {"load_time_s": 1.0}}
    ask(served, "POST", f"{client}/outcome", json.dumps(error))
    with pytest.raises(UnfinishedError) as caught:
        waited(served)
    assert str(caught.value) == "out of memory\nHint: use a smaller model"
    assert caught.value.partial == {"load_time_s": 1.0, "partial": "out of memory"}


def test_nobody_came_is_told_apart(served):
    with pytest.raises(UnfinishedError) as caught:
        waited(served, 0.3)
    assert caught.value.message == "the phone did not open the address within 0.3 s"
    assert caught.value.partial == {}


def test_a_page_that_is_closed_or_breaks_off_is_gone(served, monkeypatch):
    client = claimed(served)["client"]
    progress = {"progress": {"stage": "swaps", "done": 0, "total": 1}, "partial": {"load_time_s": 2.0}}
    ask(served, "POST", f"{client}/progress", json.dumps(progress))
    monkeypatch.setattr(visit, "_RECONNECT_S", 0.5)
    link = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    link.sendall(f"GET /{served.token}/{client}/alive HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert b"200 OK" in link.recv(15)
    link.close()
    with pytest.raises(UnfinishedError) as caught:
        waited(served, 30)
    assert caught.value.message == "the phone went away while it measured (swaps)"
    assert caught.value.partial["load_time_s"] == 2.0
    ask(served, "POST", f"{client}/gone")
    with pytest.raises(UnfinishedError, match="the phone closed the page while it measured"):
        waited(served)


def test_a_visitor_that_falls_silent_is_gone(served, monkeypatch):
    claimed(served)
    monkeypatch.setattr(visit, "_SILENCE_S", 0.3)
    with pytest.raises(UnfinishedError, match=r"the phone went away while it measured \(at the beginning\)"):
        waited(served)


def test_a_page_that_waits_is_told_why_nobody_listens_any_more(tmp_path):
    server = Server(tmp_path, {}, kind="speed", title="")
    client = claimed(server)["client"]
    link = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    link.sendall(f"GET /{server.token}/{client}/alive HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    said = link.makefile("rb")
    while said.readline().strip():
        pass
    server.__exit__(ProfileError, ProfileError("tea time", hint="tea"), None)
    assert b"event: stop\ndata: tea time\n" in said.read()
    link.close()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("203.0.113.7", "this machine cannot listen on 203.0.113.7: Cannot assign requested address"),
        (
            "my-laptop",
            "this machine cannot listen on my-laptop: 'my-laptop' does not appear to be an IPv4 or IPv6 address",
        ),
        ("0.0.0.0", "listening on '0.0.0.0' would serve the model on every network of this machine"),  # noqa: S104
        ("::", "listening on '::' would serve the model on every network of this machine"),
    ],
)
def test_only_an_address_of_this_machine_can_be_listened_on(tmp_path, address, message):
    with pytest.raises(ProfileError) as caught:
        Server(tmp_path, {}, kind="speed", title="", listen=address)
    assert caught.value.message == message


def test_ipv6_has_brackets_in_the_address(tmp_path):
    try:
        server = Server(tmp_path, {}, kind="speed", title="", listen="::1")
    except ProfileError:
        pytest.skip("this machine has no IPv6 loopback")
    with server:
        assert urlsplit(server.url).hostname == "::1"
