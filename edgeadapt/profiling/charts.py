"""Charts as inline SVG: no script, no request. Colours are classes of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 14, 30
_LONGEST_NAME = 38
_TALLEST = 12
"""A line of text."""
Label = Callable[[float], str]


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart: parts one behind the other, each a value and a class; interval: a line over it."""

    name: str
    parts: tuple[tuple[float, str], ...]
    text: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Dot:
    """A point of a scatter chart; best: no other is better in both directions."""

    x: float
    y: float
    name: str
    best: bool


@dataclass(frozen=True)
class _Scale:
    """From values to places."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round values that cover low to high, at least two."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 2.5, 5, 10) if unit * times >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def histogram(
    values: Sequence[float], marks: Sequence[tuple[str, float]], *, label: Label, title: str, most: float
) -> str:
    """Return how often values occur; `marks` are lines with a name; values run to `most` in all such charts."""
    across = ticks(0, most)
    bins = 36
    width = across[-1] / bins
    counts = [0] * bins
    for value in values:
        counts[min(int(value / width), bins - 1)] += 1
    frame = _Frame(across, ticks(0, max(counts)), label, _count, height=200)
    base = frame.y(0)
    body = [
        f'<rect class="bar base" x="{frame.x(at * width) + 0.5:.1f}" y="{frame.y(count):.1f}"'
        f' width="{frame.x(width) - frame.x(0) - 1:.1f}" height="{base - frame.y(count):.1f}">'
        f"<title>{escape(label(at * width))} to {escape(label((at + 1) * width))}: {count}</title></rect>"
        for at, count in enumerate(counts)
        if count
    ]
    for row, (name, value) in enumerate(marks):
        x, y = frame.x(min(value, across[-1])), _TOP + 9 + 13 * row
        body.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8:.1f}" y2="{base:.1f}"/>')
        body.append(_beside(x, y, f"{name} {label(value)}"))
    return frame.svg(body, title)


def bars(rows: Sequence[Bar], *, label: Label, title: str, zero: float = 0.0, shared: Sequence[float] = ()) -> str:
    """Return a bar a row, from `zero`; its name and its text stand above it. `shared`: values that the axis covers."""
    ends = [zero + sum(value for value, _ in row.parts) for row in rows]
    ends += [*shared, *(end for row in rows for end in row.interval or ())]
    across = ticks(min(zero, *ends), max(zero, *ends))
    height = _TOP + 34 * len(rows) + _BOTTOM
    frame = _Frame(across, [0, 1], label, None, height=height, left=8)
    body = []
    for at, row in enumerate(rows):
        y = _TOP + 34 * at
        body.append(f'<text class="name" x="8" y="{y + 9}">{escape(_short(row.name))}</text>')
        body.append(f'<text class="value" x="{WIDTH - _RIGHT}" y="{y + 9}">{escape(row.text)}</text>')
        start = zero
        for value, kind in row.parts:
            left, right = sorted((frame.x(start), frame.x(start + value)))
            start += value
            body.append(
                f'<rect class="bar {kind}" x="{left:.1f}" y="{y + 14}" width="{max(right - left, 1):.1f}" height="12"/>'
            )
        if row.interval is not None:
            low, high = (frame.x(end) for end in row.interval)
            body.append(f'<path class="interval" d="M{low:.1f} {y + 17}v6m0 -3H{high:.1f}m0 -3v6"/>')
    body.append(
        f'<line class="axis" x1="{frame.x(zero):.1f}" x2="{frame.x(zero):.1f}" y1="{_TOP}" y2="{frame.bottom}"/>'
    )
    return frame.svg(body, title)


def line(points: Sequence[tuple[float, float]], *, x_label: Label, y_label: Label, title: str) -> str:
    """Return a line over time with the area under it, from zero up."""
    frame = _Frame(ticks(0, points[-1][0]), ticks(0, max(y for _, y in points)), x_label, y_label, height=200)
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)
    first, last = frame.x(points[0][0]), frame.x(points[-1][0])
    highest = max(points, key=lambda point: point[1])
    body = [
        f'<path class="area" d="M{first:.1f} {frame.y(0):.1f}L{path}L{last:.1f} {frame.y(0):.1f}Z"/>',
        f'<path class="line" d="M{path}"/>',
        f'<circle class="dot base" cx="{frame.x(highest[0]):.1f}" cy="{frame.y(highest[1]):.1f}" r="3.5"/>',
        _beside(frame.x(highest[0]), frame.y(highest[1]) - 6, f"peak {y_label(highest[1])}"),
    ]
    return frame.svg(body, title)


def scatter(dots: Sequence[Dot], *, x_label: Label, y_label: Label, title: str) -> str:
    """Return points with numbers; the best ones are joined by a line."""
    across = ticks(0, max(dot.x for dot in dots) * 1.05)
    frame = _Frame(across, ticks(0, max(dot.y for dot in dots) * 1.1), x_label, y_label, height=240)
    best = sorted((dot.x, dot.y) for dot in dots if dot.best)
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in best)
    body = [f'<path class="front" d="M{path}"/>'] if len(best) > 1 else []
    for number, dot in enumerate(dots, start=1):
        x, y = frame.x(dot.x), frame.y(dot.y)
        kind = "base" if dot.best else "other"
        shown = f"{dot.name}: {x_label(dot.x)}, {y_label(dot.y)}"
        body.append(
            f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="9"><title>{escape(shown)}</title></circle>'
        )
        body.append(f'<text class="number" x="{x:.1f}" y="{y + 3.5:.1f}">{number}</text>')
    return frame.svg(body, title)


class _Frame:
    """Axes, grid and tick labels of a chart."""

    def __init__(
        self,
        across: Sequence[float],
        up: Sequence[float],
        x_label: Label,
        y_label: Label | None,
        *,
        height: int,
        left: int = _LEFT,
    ) -> None:
        self.bottom = height - _BOTTOM
        self.x = _Scale(across[0], across[-1], left, WIDTH - _RIGHT - 8)
        self.y = _Scale(up[0], up[-1], self.bottom, _TOP)
        self._height, self._left = height, left
        self._parts = [self._across(value, x_label(value)) for value in across]
        if y_label is not None:
            self._parts += [self._up(value, y_label(value)) for value in up]

    def _across(self, value: float, text: str) -> str:
        x = self.x(value)
        grid = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{self.bottom}"/>'
        side = "start" if x < 20 else "end" if x > WIDTH - 12 else "middle"
        return f'{grid}<text class="tick {side}" x="{x:.1f}" y="{self.bottom + 15}">{escape(text)}</text>'

    def _up(self, value: float, text: str) -> str:
        y = self.y(value)
        grid = f'<line class="grid" x1="{self._left}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        return f'{grid}<text class="tick end" x="{self._left - 5}" y="{y + 3.5:.1f}">{escape(text)}</text>'

    def svg(self, body: Sequence[str], title: str) -> str:
        """Return the chart."""
        inside = "".join((*self._parts, *body))
        return (
            f'<svg viewBox="0 0 {WIDTH} {self._height}" role="img" aria-label="{escape(title)}">'
            f"<title>{escape(title)}</title>{inside}</svg>"
        )


def _beside(x: float, y: float, text: str) -> str:
    """Return text beside a place, on the side where there is room, whole even at the chart's upper edge."""
    right = x < WIDTH * 0.72
    side, shift = ("start", 4) if right else ("end", -4)
    return f'<text class="note {side}" x="{x + shift:.1f}" y="{max(y, _TALLEST):.1f}">{escape(text)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _count(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else ""
