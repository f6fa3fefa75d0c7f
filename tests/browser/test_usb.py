"""A phone on a USB cable: the real adb against a device's side of its own, and headless Chromium as its browser."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from edgeadapt.errors import ProfileError
from edgeadapt.profiling import phone
from edgeadapt.profiling.runtimes import web as runtime
from tests.browser import adb_phone
from tests.browser.waiting import DEVICE, ENDLESS, Measuring

pytestmark = pytest.mark.usefixtures("chromium")


def test_over_usb_adb_carries_the_port_and_opens_the_page(decoder_job, samples_are_whole, pocket, adb_home, tmp_path):
    folder = tmp_path / "android"
    folder.mkdir()
    device = adb_phone.device(folder, {"PATH": os.environ["PATH"]})
    try:
        measuring = Measuring(decoder_job(runtime, DEVICE), address=device.address)
        with pocket(slower=1, flags=(f"--host-resolver-rules=MAP 127.0.0.1 {adb_phone.LOOPBACK}",)) as browser:
            browser.open(_opened(folder, measuring))
            browser.wait_for("Done")
        found = measuring.result()
        assert not isinstance(found, ProfileError), found
        samples_are_whole(found)
        assert found["threads"] == 2, "a page that comes through adb counts as the phone's own"
        assert measuring.invitation.remark == f"adb opens it on {device.address}"
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((adb_phone.LOOPBACK, urlsplit(measuring.url).port), timeout=5)
    finally:
        device.stop()


def test_a_cable_that_is_pulled_is_an_error_that_keeps_what_was_measured(decoder_job, pocket, adb_home, tmp_path):
    folder = tmp_path / "android"
    folder.mkdir()
    device = adb_phone.device(folder, {"PATH": os.environ["PATH"]})
    try:
        measuring = Measuring(decoder_job(runtime, DEVICE, workload=ENDLESS), address=device.address)
        with pocket(slower=1, flags=(f"--host-resolver-rules=MAP 127.0.0.1 {adb_phone.LOOPBACK}",)) as browser:
            browser.open(_opened(folder, measuring))
            measuring.wait_for_texts()
            device.stop()
            error = measuring.result()
        assert error.message.startswith("the phone went away while it measured (texts (")
        assert error.partial["latency_s"]
    finally:
        device.stop()


def test_a_phone_that_adb_does_not_know_is_told(decoder_job, adb_home):
    with pytest.raises(ProfileError) as caught:
        phone.measure(decoder_job(runtime, DEVICE), None, "0123456789ABCDEF", 5, lambda _: None)
    assert caught.value.message.startswith("adb cannot open the page on 0123456789ABCDEF; it said: ")
    assert "not found" in caught.value.message


@pytest.fixture
def adb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home and a port of adb's own: no server and no key of the user is touched; in the end no server is left."""
    if shutil.which("adb") is None:
        pytest.skip("there is no program adb: scripts/install-web-tools could not install it")
    home = tmp_path / "home"
    home.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    yield
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def _opened(folder: Path, measuring: Measuring) -> str:
    """What the phone was told to open."""
    end = time.monotonic() + 60
    while not (folder / "opened").exists():
        assert measuring.found is None, measuring.found
        assert time.monotonic() < end
        time.sleep(0.05)
    told = (folder / "opened").read_text().split()
    assert told[:-1] == ["start", "-a", "android.intent.action.VIEW", "-d"]
    assert told[-1] == measuring.url
    return told[-1]
