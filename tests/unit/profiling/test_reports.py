"""Reports: what they say, that nothing in a profile becomes markup, and how the page lies in a real browser."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from edgeadapt.errors import ProfileError
from edgeadapt.profiling import Profile, charts, profile
from edgeadapt.profiling.figures import Quality
from edgeadapt.profiling.labels import labels
from edgeadapt.profiling.labels import table as columns
from edgeadapt.profiling.reports import write_report
from edgeadapt.profiling.sections import pareto

SMALL = {"threads": 1, "prompt_tokens": 8, "new_tokens": 5, "repeats": 2, "attempts": 1}
CHROMIUM = shutil.which("chromium")
EVIL = '<script>alert("1")</script> | `*_'


@pytest.fixture(scope="module")
def found(decoder) -> Profile:
    return profile(decoder, adapter="b", operators=True, **SMALL)


@pytest.fixture(scope="module")
def pair(found, classifier) -> list[Profile]:
    other = profile(classifier, operators=True, **SMALL)
    # so small a model is loaded and run between two looks at its memory
    return [dataclasses.replace(each, memory_timeline=((0.1, 6e7), (0.2, 9e7), (0.4, 8e7))) for each in (found, other)]


def _write(report_format, tmp_path, profiles):
    path = tmp_path / f"report.{report_format}"
    write_report(report_format, path, profiles)
    return path.read_text(encoding="utf-8")


def test_a_peak_at_the_upper_edge_is_named_inside_the_chart():
    drawn = charts.line([(0.0, 1.0), (1.0, 80.0)], x_label=str, y_label=str, title="memory")
    (height,) = re.findall(r'class="note [^>]* y="([^"]+)">peak 80', drawn)
    assert float(height) >= 12  # below it the letters' tops are cut off


def test_profiles_have_different_names(found):
    assert labels([found]) == ["a decoder.bundle · b"]
    slower = dataclasses.replace(found, threads=2)
    assert labels([found, slower]) == ["a decoder.bundle · b · 1 threads", "a decoder.bundle · b · 2 threads"]
    assert labels([found, found]) == ["a decoder.bundle · b #1", "a decoder.bundle · b #2"]
    elsewhere = dataclasses.replace(found, adapter=None, device=dataclasses.replace(found.device, name="pi5"))
    assert labels([found, elsewhere]) == ["a decoder.bundle · b · cpu", "a decoder.bundle · base · pi5"]


def test_each_profile_keeps_its_own_column(pair):
    head, *body = columns(pair)
    assert head == ["figure", "a decoder.bundle · b", "topics.bundle · base"]
    cells = {row[0]: row[1:] for row in body}
    assert len(cells) == len(body)
    assert cells["throughput"][0] == "–"
    assert cells["decode (5 new tokens)"][1] == "–"


def test_csv_holds_plain_numbers(pair, tmp_path):
    evil = dataclasses.replace(pair[0], bundle="=1+1")
    rows = {row[0]: row[1:] for row in csv.reader(_write("csv", tmp_path, [evil, pair[1]]).splitlines())}
    assert rows["latency_p50_s"] == [str(pair[0].latency_p50_s), str(pair[1].latency_p50_s)]
    assert rows["decode_tokens_per_s"][1] == ""
    assert rows["peak_resident_bytes"][1] == str(pair[1].memory.peak_resident_bytes)
    assert rows["bundle"] == ["'=1+1", "topics.bundle"]


def test_markdown_is_one_table_and_its_cells_are_plain(pair, tmp_path):
    evil = dataclasses.replace(pair[0], bundle=EVIL, warnings=("a\n# b",))
    text = _write("markdown", tmp_path, [evil, pair[1]])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "<script" not in text.replace("\\<", "")
    assert "- a \\# b" in text


def test_the_trace_holds_every_operator_and_no_two_overlap(pair, tmp_path):
    events = json.loads(_write("trace", tmp_path, pair))["traceEvents"]
    for process, each in enumerate(pair, start=1):
        mine = [event for event in events if event["pid"] == process and event["ph"] == "X"]
        assert [event["name"] for event in mine] == [operator.name for operator in each.operators]
        assert sum(event["dur"] for event in mine) == pytest.approx(1e6 * sum(o.seconds for o in each.operators))
        ends = [event["ts"] + event["dur"] for event in mine]
        assert all(later["ts"] >= end - 1e-6 for later, end in zip(mine[1:], ends, strict=False))
    assert {event["tid"] for event in events if event["pid"] == 1} == {0, 1}
    with pytest.raises(ProfileError, match=r"the profile 'topics\.bundle · base' has no times of operators"):
        write_report("trace", tmp_path / "none.json", [dataclasses.replace(pair[1], operators=None)])
    assert not (tmp_path / "none.json").exists()


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_loads_nothing_and_nothing_in_a_profile_is_markup(pair, tmp_path):
    evil = dataclasses.replace(
        pair[0],
        bundle=EVIL,
        runtime=EVIL,
        warnings=(EVIL,),
        failures=(EVIL,),
        device=dataclasses.replace(pair[0].device, title=EVIL),
        operators=tuple(dataclasses.replace(each, op_type=EVIL) for each in pair[0].operators),
        host=dataclasses.replace(pair[0].host, cpu=EVIL, versions={EVIL: EVIL}),
    )
    page = _Page()
    page.feed(_write("html", tmp_path, [evil, pair[1]]))
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    assert not {name for name, _ in page.attributes} & {"src", "href", "xlink:href", "onload", "style"}
    assert not re.search(r"https?:|url\(|@import", "".join(page.text))
    assert "".join(page.text).count(EVIL) > 10
    assert page.tags.count("svg") == 8  # latency, tax, memory and operators of two


def test_a_page_says_what_is_doubtful(found, tmp_path):
    quiet = dataclasses.replace(found, noisy=False, warnings=(), notes=(), failures=())
    assert "Nothing disturbed the timing" in _write("html", tmp_path, [quiet])
    noisy = dataclasses.replace(found, noisy=True, warnings=("others worked",))
    text = _write("html", tmp_path, [noisy])
    assert "These figures are doubtful" in text
    assert "others worked" in text
    assert "Nothing disturbed" not in text
    emulated = dataclasses.replace(quiet, emulated=True)
    assert "nothing was timed" in _write("html", tmp_path, [emulated])


def test_the_best_ones_are_those_that_no_other_beats(found):
    def at(name, seconds, kl):
        return dataclasses.replace(found, bundle=name, latency_p50_s=seconds, quality=Quality(kl, None))

    profiles = [at("fast", 0.01, 0.3), at("good", 0.03, 0.1), at("bad", 0.04, 0.2)]
    (card,) = pareto([each.bundle for each in profiles], profiles)
    assert re.findall(r'class="dot (\w+)" .*?<title>(\w+):', card) == [
        ("base", "fast"),
        ("base", "good"),
        ("other", "bad"),
    ]
    assert 'class="front"' in card
    elsewhere = dataclasses.replace(profiles[1], device=dataclasses.replace(found.device, name="pi5"))
    assert pareto(["a", "b"], [profiles[0], elsewhere]) == []  # two machines are not compared
    assert pareto(["a", "b"], [profiles[0], dataclasses.replace(profiles[1], adapter="a")]) == []


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (0, 7.3), (-0.1, 0.034), (0, 3e8), (0.9, 1.2), (0, 2e-6)])
def test_ticks_cover_the_values(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8


_HARNESS = """<!doctype html><body><script>
onload = () => {
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, view = page.documentElement;
    const wide = [...page.querySelectorAll("main > *:not(.scroll), .card, svg, .tile")]
      .filter((each) => each.getBoundingClientRect().right > frame.clientWidth + 0.5).length;
    found.push({ overflow: view.scrollWidth - frame.clientWidth, wide,
      charts: [...page.querySelectorAll("svg")].filter((each) => each.getBoundingClientRect().height > 50).length,
      colour: frame.contentWindow.getComputedStyle(page.body).backgroundColor });
  }
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
};
</script>FRAMES</body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("scheme", "colour"), [(1, "rgb(246, 247, 249)"), (0, "rgb(16, 21, 28)")])
def test_in_a_browser_it_fits_a_phone_and_follows_the_colour_scheme(pair, tmp_path, scheme, colour):
    frames = []
    for width, profiles in ((390, pair[:1]), (390, pair), (1200, pair)):
        page = _write("html", tmp_path, profiles).replace("&", "&amp;").replace('"', "&quot;")
        frames.append(f'<iframe srcdoc="{page}" style="border:0;width:{width}px;height:800px"></iframe>')
    harness = tmp_path / "harness.html"
    harness.write_text(_HARNESS.replace("FRAMES", "".join(frames)), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'user'}"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1300,900", "--dump-dom"]
    done = subprocess.run([*command, harness.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(re.search("FOUND(.*)END", done.stdout).group(1))
    assert [(each["overflow"], each["wide"], each["charts"]) for each in seen] == [(0, 0, 4), (0, 0, 8), (0, 0, 8)]
    assert {each["colour"] for each in seen} == {colour}
