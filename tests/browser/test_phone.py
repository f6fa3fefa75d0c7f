"""A phone without anything installed: headless Chromium with a phone's screen and a slow processor plays it."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zxingcpp

from edgeadapt.device import read_device
from edgeadapt.errors import ProfileError, UnfinishedError
from edgeadapt.profiling import phone, profile
from edgeadapt.profiling.runtimes import web as runtime
from edgeadapt.profiling.web.memory import processes_below
from tests.browser.waiting import DEVICE, ENDLESS, Measuring

pytestmark = pytest.mark.usefixtures("chromium")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_measures_and_shows_its_figures(decoder_job, samples_are_whole, pocket, tmp_path, dark):
    measuring = Measuring(decoder_job(runtime, DEVICE))
    with pocket(dark=dark) as browser:
        browser.open(measuring.url)
        text = browser.wait_for("Done")
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        width = browser.value("document.documentElement.scrollWidth")
        browser.picture(_pictures(tmp_path) / f"phone-{'dark' if dark else 'light'}.png")
    found = measuring.result()
    samples_are_whole(found)
    assert all(row["relative_error"] < 1e-5 for row in found["checks"])
    assert found["threads"] == 2
    assert found["machine"] is None
    for words in ("my bundle", "Chromium", "Each further token", "tokens/s", "With adapter a", "You can close"):
        assert words in text
    assert ground == ("rgb(15, 20, 26)" if dark else "rgb(246, 247, 249)")
    assert width == 390, "the page is wider than the phone's screen"
    assert "first run" in measuring.stages


def test_a_second_phone_is_refused_and_one_that_goes_away_is_an_error_that_keeps_what_it_measured(
    decoder_job, pocket, tmp_path
):
    measuring = Measuring(decoder_job(runtime, DEVICE, workload=ENDLESS))
    with pocket(slower=1) as browser, pocket(slower=1) as other:
        browser.open(measuring.url)
        measuring.wait_for_texts()
        browser.picture(_pictures(tmp_path) / "phone-working.png")
        other.open(measuring.url)
        refused = other.wait_for("Another device is measuring")
        assert "This address is for one visit, and that has begun. Run the command again." in refused
        other.picture(_pictures(tmp_path) / "phone-refused.png")
        assert measuring.found is None
        for pid, kind in processes_below(browser.browser.pid):
            if kind == "renderer":
                os.kill(pid, signal.SIGKILL)
        error = measuring.result()
        assert isinstance(error, UnfinishedError)
        assert error.message.startswith("the phone went away while it measured (texts (")
        assert error.partial["partial"] == error.message
        assert error.partial["latency_s"]
        other.open(measuring.url)  # the address is over, nobody listens


def test_a_page_that_is_left_says_so_at_once(decoder_job, pocket):
    measuring = Measuring(decoder_job(runtime, DEVICE, workload=ENDLESS))
    with pocket(slower=1) as browser:
        browser.open(measuring.url)
        browser.wait_for("Texts")
        browser.open("about:blank")
        error = measuring.result()
    assert error.message.startswith("the phone closed the page while it measured (")


def test_a_phone_that_nobody_waits_for_any_more_is_told(decoder_job, pocket):
    measuring = Measuring(decoder_job(runtime, DEVICE, workload=ENDLESS), timeout_s=12)
    with pocket(slower=1) as browser:
        browser.open(measuring.url)
        text = browser.wait_for("Stopped by the computer")
    assert "The phone was not done within 12 s" in text
    assert measuring.result().message.startswith("the phone was not done within 12 s (")


def test_a_job_that_fails_on_the_phone_is_told_on_both_sides(decoder_job, pocket, tmp_path):
    measuring = Measuring(decoder_job(runtime, DEVICE, tax_adapter="c"))
    with pocket(slower=1) as browser:
        browser.open(measuring.url)
        text = browser.wait_for("This did not work")
        browser.picture(_pictures(tmp_path) / "phone-failed.png")
    assert "The job has no adapter c." in text
    assert "It has a, b." in text
    assert "FIGURES UNTIL THEN" in text
    error = measuring.result()
    assert (error.message, error.hint) == ("the job has no adapter c", "it has a, b")
    assert len(error.partial["latency_s"]) == 6


def test_over_the_network_one_thread_is_used_and_the_reason_noted(decoder_job, pocket):
    """A name that is not localhost stands for another machine: browsers judge an address by its name."""
    measuring = Measuring(decoder_job(runtime, DEVICE), listen="127.0.0.2")
    assert measuring.url.startswith("http://127.0.0.2:")
    assert "without encryption" in measuring.invitation.remark
    with pocket(slower=1, flags=("--host-resolver-rules=MAP computer.test 127.0.0.2",)) as browser:
        browser.open(measuring.url.replace("127.0.0.2", "computer.test"))
        browser.wait_for("Done")
    found = measuring.result()
    assert found["threads"] == 1
    assert any(note.startswith("1 thread instead of 2: browsers give a page") for note in found["notes"])


def test_the_qr_code_is_the_address_and_fits_a_terminal(tmp_path):
    url = "http://192.168.100.200:54321/abcdefghijklmnopqrstuvwx/"
    lines = phone.qr_code(url).splitlines()
    assert max(len(line) for line in lines) <= 40
    assert _decoded(lines) == url


def test_a_machine_without_adb_says_how_to_get_it(decoder_job, monkeypatch, tmp_path):
    job = decoder_job(runtime, DEVICE)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProfileError, match="there is no program adb here"):
        phone.measure(job, None, "0123456789ABCDEF", 5, lambda _: None)


def _pictures(folder: Path) -> Path:
    """Where screenshots go: to be looked at where the environment names a folder."""
    named = Path(os.environ.get("EDGEADAPT_PICTURES", folder))
    named.mkdir(parents=True, exist_ok=True)
    return named


def _decoded(lines: list[str]) -> str:
    """Read a QR code as a camera would see it on a dark terminal."""
    upper, lower = {"█", "▀"}, {"█", "▄"}
    rows = [[255 * (character in bright) for character in line] for line in lines for bright in (upper, lower)]
    image = np.kron(np.asarray(rows, np.uint8), np.ones((6, 6), np.uint8))
    (found,) = zxingcpp.read_barcodes(image)
    return str(found.text)


def test_a_profile_of_a_phone(decoder_bundle, pocket):
    with pocket(slower=1) as browser:
        found = profile(
            decoder_bundle,
            device="phone",
            prompt_tokens=8,
            new_tokens=4,
            repeats=2,
            announce=lambda invitation: browser.open(invitation.url),
        )
    assert found.decode_tokens_per_s > 0
    assert found.device.transport == "phone"
    assert {check.adapter for check in found.checks} == {None, "a", "b"}
    assert found.failures == ()
    assert "the browser of another device does not tell how much memory a page takes" in found.notes


def test_a_phone_that_goes_away_leaves_a_profile_of_what_it_measured(decoder_bundle, pocket):
    with pocket(slower=1) as browser:

        def visit(invitation):
            browser.open(invitation.url)
            leaver.start()

        def leave():
            browser.wait_for("Texts")
            time.sleep(3)  # the page tells of its samples every second or so
            browser.open("about:blank")

        leaver = threading.Thread(target=leave)
        found = profile(decoder_bundle, device="phone", prompt_tokens=8, new_tokens=4, repeats=10**6, announce=visit)
        leaver.join()
    (failure,) = found.failures
    assert failure.startswith("speed: the phone closed the page while it measured (")
    assert found.latency_p50_s > 0
    assert found.adapter_tax is None


def test_a_phone_needs_somebody_who_is_told_where_the_page_is(decoder_bundle):
    with pytest.raises(ProfileError, match="nobody is told where the page is"):
        profile(decoder_bundle, device="phone", prompt_tokens=8, new_tokens=4)
    with pytest.raises(ProfileError, match="opens no page, so there is nothing to listen on"):
        profile(decoder_bundle, device=replace(read_device("cpu"), listen="192.168.1.2"))
