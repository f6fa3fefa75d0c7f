"""A bar chart as SVG, written by hand: readable on light and dark pages, no library needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ROW, LEFT, WIDTH, RIGHT = 34, 210, 430, 170
STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #24292f; }
  .note { fill: #57606a; font-size: 11px; }
  .base { fill: #8c959f; } .adapter { fill: #0969da; } .spread { stroke: #24292f; stroke-width: 1; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .note { fill: #9198a1; }
    .base { fill: #6e7681; } .adapter { fill: #4493f8; } .spread { stroke: #e6edf3; }
  }
"""


@dataclass(frozen=True)
class Row:
    """One engine: (median, low, high) without and with an adapter, either may be None; a note at the right."""

    label: str
    base: tuple[float, float, float] | None
    adapter: tuple[float, float, float] | None
    note: str


def bar_chart(title: str, rows: Sequence[Row]) -> str:
    """The picture."""
    most = max((bar[2] for row in rows for bar in (row.base, row.adapter) if bar), default=1.0)
    height = 64 + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text x="8" y="18" font-weight="600">{escape(title)}</text>',
        f'<rect class="base" x="{LEFT}" y="30" width="10" height="10"/><text x="{LEFT + 15}" y="39">no adapter</text>',
        f'<rect class="adapter" x="{LEFT + 100}" y="30" width="10" height="10"/>',
        f'<text x="{LEFT + 115}" y="39">LoRA, r=16 on every linear</text>',
    ]
    for number, row in enumerate(rows):
        top = 52 + number * ROW
        parts.append(f'<text x="{LEFT - 8}" y="{top + 18}" text-anchor="end">{escape(row.label)}</text>')
        parts.append(f'<text class="note" x="{LEFT + WIDTH + 8}" y="{top + 18}">{escape(row.note)}</text>')
        for offset, kind, bar in ((0, "base", row.base), (13, "adapter", row.adapter)):
            if bar is not None:
                parts += _bar(top + offset, kind, bar, WIDTH * 0.9 / most)
    return "\n".join([*parts, "</svg>", ""])


def _bar(top: int, kind: str, bar: tuple[float, float, float], scale: float) -> list[str]:
    median, low, high = bar
    end, middle = LEFT + median * scale, top + 6
    left, right = LEFT + low * scale, LEFT + high * scale
    return [
        f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{median * scale:.1f}" height="11"/>',
        f'<line class="spread" x1="{left:.1f}" x2="{right:.1f}" y1="{middle}" y2="{middle}"/>',
        f'<text class="note" x="{max(end, right) + 4:.1f}" y="{top + 10}">{median:.0f}</text>',
    ]
