"""Any phone or tablet, with nothing installed on it: its browser opens a page, measures, and sends the figures back.

The page is served on this machine's loopback, where an Android phone on a USB cable reaches it through adb, or on one
named address of this machine for devices in its network. Whoever knows the address may open it, once: it holds a token
that nobody can guess.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import segno

from edgeadapt.profiling.transports import Invitation
from edgeadapt.profiling.web.packages import runtime_files
from edgeadapt.profiling.web.server import Server
from edgeadapt.profiling.web.usb import opened_on_android

LOOPBACK = "127.0.0.1"


def measure(
    folder: Path,
    listen: str | None,
    address: str | None,
    timeout_s: float | None,
    announce: Callable[[Invitation], None],
    *,
    what: str = "speed",
    title: str = "edgeadapt profile",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the samples that a phone's browser sends.

    Args:
        folder: a job's, prepared by the runtime "web".
        listen: this machine's address to serve on, None for loopback alone.
        address: an Android device on which adb opens the page, as `adb devices` calls it; None where somebody opens it.
        timeout_s: how long all may take, None for as long as it needs.
        announce: is told where the page is, once, when it can be opened.
        what: "speed", which includes the checks, or "checks".
        title: what the page says that it does.
        progress: is told what the phone does, when that changes.

    Raises:
        UnfinishedError: if nobody opened the page, the phone went away or failed, or time was over; with what was
            measured until then.
        ProfileError: if this machine cannot listen on that address, a package is missing, or adb cannot open the page.
    """
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    files = runtime_files(job["options"]["provider"])
    with Server(folder, files, kind=what, title=title, listen=listen or LOOPBACK) as server:
        usb = nullcontext() if address is None else opened_on_android(address, server.port, server.url, listen)
        with usb:
            announce(Invitation(server.url, qr_code(server.url), _remark(listen, address)))
            return server.visit.wait(timeout_s, where="the phone", watch=lambda: None, progress=progress)


def qr_code(url: str) -> str:
    """Return a QR code of half-block characters."""
    text = io.StringIO()
    segno.make(url, error="l", micro=False).terminal(text, border=2, compact=True)
    return text.getvalue()


def _remark(listen: str | None, address: str | None) -> str:
    if address is not None:
        return f"adb opens it on {address}"
    if listen is None:
        return "only this machine can open it; with --address a phone on a USB cable, with --listen those in a network"
    return f"devices in the network of {listen} can open it; without encryption, so in a network that you trust"
