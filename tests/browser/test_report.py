"""Reports in a real browser: light and dark, on a phone and on a desk, with pictures of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from edgeadapt.cli.app import app

DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}

FAINT = """
(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = parts(colour).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  for (const node of document.querySelectorAll("body *")) {
    const said = [...node.childNodes].filter(each => each.nodeType === 3).map(each => each.data.trim()).join("");
    if (!said || ["style", "title"].includes(node.localName)) continue;
    const style = getComputedStyle(node);
    const own = light(node instanceof SVGElement ? style.fill : style.color), behind = light(ground(node));
    const contrast = (Math.max(own, behind) + 0.05) / (Math.min(own, behind) + 0.05);
    if (contrast < 4.5) faint.push(`${said}: ${contrast.toFixed(1)}`);
  }
  return faint;
})()
"""
"""Texts with less contrast than WCAG's AA asks for (4.5), by the luminance of their colour and of their ground's."""

OUTSIDE = """
[...document.querySelectorAll("svg text")].filter(text => {
  const own = text.getBoundingClientRect(), chart = text.ownerSVGElement.getBoundingClientRect();
  return own.left < chart.left - 1 || own.right > chart.right + 1
    || own.top < chart.top - 1 || own.bottom > chart.bottom + 1;
}).map(text => text.textContent)
"""
"""Words of charts that are cut off."""

TINY = """
[...document.querySelectorAll("body *")].filter(node =>
  [...node.childNodes].some(each => each.nodeType === 3 && each.data.trim())
  && !["style", "title"].includes(node.localName)
  && parseFloat(getComputedStyle(node).fontSize)
     * (node.ownerSVGElement ? node.ownerSVGElement.getBoundingClientRect().width
        / node.ownerSVGElement.viewBox.baseVal.width : 1) < 9
).map(node => node.textContent)
"""
"""Words that are drawn smaller than nine CSS pixels."""


@pytest.fixture(scope="module")
def pages(write_decoder_bundle, tmp_path_factory):
    """A report of one profile, and one of two, as the commands write them."""
    if shutil.which("chromium") is None:
        pytest.skip("there is no program chromium: scripts/install-web-tools could not install it")
    folder = tmp_path_factory.mktemp("report")
    bundle = str(write_decoder_bundle(folder / "a decoder.bundle"))
    small = ["--device", "cpu", "--threads", "1", "--prompt-tokens", "8", "--new-tokens", "5", "--repeats", "2"]
    for name, adapter in (("one", "a"), ("other", "b")):
        kept = ["-o", str(folder / f"{name}.json"), "--html", str(folder / f"{name}.html")]
        _run("profile", bundle, *small, "--adapter", adapter, "--operators", "-q", *kept)
    _run("report", str(folder / "one.json"), str(folder / "other.json"), "--html", str(folder / "two.html"))
    return folder


@pytest.mark.parametrize("screen", ["phone", "desk"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", ["one", "two"])
def test_a_report_can_be_read(pages, pocket, tmp_path, page, dark, screen):
    with pocket(dark=dark, slower=1) as browser:
        if screen == "desk":
            browser.call("Emulation.setDeviceMetricsOverride", **DESK)
        browser.open((pages / f"{page}.html").as_uri())
        text = browser.wait_for("All figures")
        width = browser.value("innerWidth")
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value(OUTSIDE) == []
        assert browser.value(TINY) == []
        assert browser.value(FAINT) == []
        assert browser.value("performance.getEntriesByType('resource').length") == 0
        assert browser.value("document.scripts.length") == 0
        image = _picture(browser, tmp_path, f"report-{page}-{screen}-{'dark' if dark else 'light'}.png")
    assert {"phone": 390, "desk": 1280}[screen] == width
    for words in ("Latency distribution", "Memory over time", "What the adapter costs", "Operators"):
        assert words in text
    assert ("Profile of a decoder" if page == "one" else "2 profiles") in text
    ground = image.getpixel((0, 0))
    assert max(ground) < 60 if dark else min(ground) > 200
    assert len(image.getcolors(2**24)) > 50  # words and charts, not a bare ground


def _run(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output


def _picture(browser, folder, name):
    """Take a picture of the page, to be looked at where the environment names a folder; return it."""
    kept = Path(os.environ.get("EDGEADAPT_PICTURES", folder)) / name
    kept.parent.mkdir(parents=True, exist_ok=True)
    browser.picture(kept)
    return Image.open(kept).convert("RGB")
