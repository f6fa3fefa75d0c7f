"""A result file, read: samples by side and metric, of the quiet rounds, and what is derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from statistics_of import ratio, summary

ENOUGH = 3
"""With fewer quiet rounds than this, noisy ones are used too."""
Stat = Mapping[str, Any]


class Figures:
    """Figures of one result of bench.py."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.result = result
        self.sides: dict[str, dict[str, Any]] = result["sides"]
        rounds = result.get("rounds", [])
        quiet = {row["round"] for row in rounds if not row["noisy"]}
        self.only_quiet = len(quiet) >= ENOUGH
        self.used = quiet if self.only_quiet else {row["round"] for row in rounds}

    def find(self, engine: str, configuration: str, state: str | None = None) -> str | None:
        """The name of a side that was measured; `state` is its note, its adapter, or None for the bare base."""
        for name, side in self.sides.items():
            own = side["note"] or side["adapter"]
            if (side["engine"], side["configuration"], own) == (engine, configuration, state):
                return name if side.get("rounds") else None
        return None

    def rounds(self, side: str, metric: str) -> dict[int, float]:
        """Samples by round: "decode" and "prefill" in tokens per second, "ttft_128" and "ttft_512" in seconds."""
        setting = self.result["setting"]
        key, above = {
            "decode": ("decode_s", setting["new_tokens"]),
            "prefill": ("prefill_512_s", setting["long_prompt_tokens"]),
            "ttft_128": ("prefill_128_s", None),
            "ttft_512": ("prefill_512_s", None),
        }[metric]
        found = {}
        for number, samples in self.sides[side].get("rounds", {}).items():
            if int(number) in self.used and key in samples:
                found[int(number)] = samples[key] if above is None else above / samples[key]
        return found

    def summary(self, side: str, metric: str) -> Stat | None:
        """Median and spread."""
        samples = list(self.rounds(side, metric).values())
        return summary(samples) if samples else None

    def ratio(self, above: str | None, below: str | None, metric: str) -> Stat | None:
        """The paired ratio of two sides with its interval; None if one was not measured."""
        if above is None or below is None:
            return None
        return ratio(self.rounds(above, metric), self.rounds(below, metric))

    def tax(self, adapted: str | None, plain: str | None) -> Stat | None:
        """The share of decode speed that an adapter costs: 1 - tokens/s with it / tokens/s without."""
        found = self.ratio(adapted, plain, "decode")
        if found is None:
            return None
        # The interval's ends change places with the sign.
        low, high = (None if found[end] is None else 1 - found[end] for end in ("high", "low"))
        return {"median": 1 - found["median"], "low": low, "high": high, "n": found["n"]}

    def starts(self, side: str | None, *path: str) -> float | None:
        """The median over fresh starts of a figure such as ("memory", "loaded", "resident_bytes")."""
        found = []
        for start in self.sides[side].get("starts", []) if side else []:
            value: Any = start
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                found.append(value)
        return median(found) if found else None

    def swap(self, side: str | None, kind: str) -> float | None:
        """The median of a swap's samples, in seconds."""
        samples = ((self.sides[side].get("swaps") or {}).get(kind) or []) if side else []
        known = [sample for sample in samples if sample is not None]
        return median(known) if known else None

    def quality(self, side: str | None) -> dict[str, Any]:
        """A side's agreement with torch and PEFT, {} if it was not measured."""
        return (self.sides[side].get("quality") or {}) if side else {}

    def made(self, engine: str, configuration: str) -> dict[str, Any]:
        """What making an engine's model files cost, {} if that failed."""
        found: dict[str, Any] = self.result["made"].get(f"{engine} {configuration}", {})
        return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    if not rows:
        return "(nothing measured)"
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
