"""The project's bars one by one: what was aimed at, what one run of the harness measured, met or missed.

Every bar is in the table whatever it says; a figure that was not taken is "not measured", never left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from figures import Figures, Stat
from statistics_of import ratio

MB = 1e6


@dataclass(frozen=True)
class Bar:
    """One line. value None: not measured; `above`: the value has to be at least the bar instead of at most."""

    what: str
    bar: str
    stretch: str
    limit: float
    value: float | None
    shown: str
    above: bool = False

    @property
    def verdict(self) -> str:
        """Met, missed or not measured."""
        if self.value is None:
            return "not measured"
        return "met" if (self.value >= self.limit if self.above else self.value <= self.limit) else "**missed**"


def bars(figures: Figures, others: Mapping[str, Any]) -> list[Bar]:
    """All bars; `others` are further result files by name ("shapes", "architectures")."""
    return [
        *_taxes(figures, others.get("shapes")),
        *_speeds(figures),
        *_swaps(figures),
        *_memory(figures),
        *_promotion(figures),
        *_quality(figures),
        *_costs(figures, others.get("architectures")),
    ]


def percent(stat: Stat | None) -> str:
    """A share with its interval."""
    if stat is None:
        return "–"
    interval = "" if stat["low"] is None else f" ({stat['low']:.1%} to {stat['high']:.1%})"
    return f"{stat['median']:.1%}{interval}"


def times(stat: Stat | None) -> str:
    """A ratio with its interval."""
    if stat is None:
        return "–"
    interval = "" if stat["low"] is None else f" ({stat['low']:.2f} to {stat['high']:.2f})"
    return f"{stat['median']:.2f} ×{interval}"


def less_one(stat: Stat | None) -> Stat | None:
    """A ratio as what it is more than 1."""
    return None if stat is None else {k: v if k == "n" or v is None else v - 1 for k, v in stat.items()}


def _median(stat: Stat | None) -> float | None:
    return None if stat is None else float(stat["median"])


def _taxes(f: Figures, shapes: Mapping[str, Any] | None) -> list[Bar]:
    found = []
    for scheme, bar, stretch in (("int4", 0.20, 0.10), ("int8", 0.12, 0.05)):
        base = f.find("edgeadapt", scheme)
        tax = f.tax(f.find("edgeadapt", scheme, "sql"), base)
        what = f"Adapter tax, decode, slots, r=16 all-linear, {scheme}"
        found.append(Bar(what, f"≤ {bar:.0%}", f"≤ {stretch:.0%}", bar, _median(tax), percent(tax)))
    for scheme in ("int4", "int8"):
        tax = f.tax(f.find("edgeadapt", f"{scheme}-qv8", "qv8"), f.find("edgeadapt", scheme))
        what = f"the same, r=8 on q and v, {scheme} (random adapter)"
        found.append(Bar(what, "≤ 4 %", "≤ 2 %", 0.04, _median(tax), percent(tax)))
    for row in (shapes or {}).get("rows", []) if shapes else []:
        if row["parameters"] > 8e8 and row["tax"] is not None:
            what = f"the same, {row['shape']} shape, r=16 all-linear, {row['scheme']} (random weights)"
            found.append(Bar(what, "≤ 8 %", "≤ 3 %", 0.08, row["tax"]["median"], percent(row["tax"])))
    if not any("shape," in bar.what for bar in found):
        found.append(Bar("the same on shapes of 1 B parameters", "≤ 8 %", "≤ 3 %", 0.08, None, "–"))
    idle = f.tax(f.find("edgeadapt", "int8", "none active"), f.find("edgeadapt", "int8"))
    found.append(Bar("Tax with adapters there and none active, int8", "≤ 1 %", "0", 0.01, _median(idle), percent(idle)))
    for scheme in ("int8", "int4"):
        tax = f.tax(f.find("edgeadapt", scheme, "promoted"), f.find("edgeadapt", scheme))
        found.append(Bar(f"Tax when promoted, {scheme}", "≤ 1 %", "0", 0.01, _median(tax), percent(tax)))
    return found


def _speeds(f: Figures) -> list[Bar]:
    found = []
    for ours, theirs in (("int8", "Q8_0"), ("int4", "Q4_0")):
        faster = f.ratio(f.find("edgeadapt", ours, "sql"), f.find("llamacpp", theirs, "sql"), "decode")
        what = f"Decode with a LoRA in slots, {ours} / llama.cpp {theirs} with the same LoRA"
        found.append(Bar(what, "≥ 1.5 ×", "2 ×", 1.5, _median(faster), times(faster), above=True))
    for ours, theirs in (("int8", "Q8_0"), ("int4", "Q4_0"), ("int4", "Q4_1")):
        mine, other = f.find("edgeadapt", ours), f.find("llamacpp", theirs)
        faster = f.ratio(mine, other, "decode")
        kls = " / ".join(_number(f.quality(side).get("mean_kl"), "{:.4f}") for side in (mine, other))
        what = f"Decode, no adapter, {ours} / llama.cpp {theirs}"
        found.append(Bar(what, "≥ 1.0 ×", "1.3 ×", 1.0, _median(faster), f"{times(faster)}; KL {kls}", above=True))
    for scheme in ("int8", "int4"):
        faster = f.ratio(f.find("edgeadapt", scheme), f.find("openvino", "int8"), "prefill")
        what = f"Prefill of 512 tokens, {scheme} / OpenVINO int8"
        found.append(Bar(what, "≥ 1.0 ×", "1.2 ×", 1.0, _median(faster), times(faster), above=True))
    for scheme in ("int8", "int4"):
        for metric in ("ttft_128", "ttft_512"):
            longer = f.ratio(f.find("edgeadapt", scheme, "sql"), f.find("edgeadapt", scheme), metric)
            over = less_one(longer)
            what = f"Adapter's share of the time to the first token, {metric[5:]} tokens, {scheme}"
            found.append(Bar(what, "≤ 5 %", "≤ 2 %", 0.05, _median(over), percent(over)))
    return found


def _swaps(f: Figures) -> list[Bar]:
    found = []
    for scheme in ("int8", "int4"):
        side = f.find("edgeadapt", scheme, "sql")
        for kind, limit, stretch in (("resident", 1e-4, "≤ 0.02 ms"), ("from_disk", 1e-2, "≤ 2 ms")):
            value = f.swap(side, f"{kind}_ready_s")
            what = f"Swap, {kind.replace('_', ' ')}, call to ready, {scheme}"
            found.append(Bar(what, f"≤ {limit * 1e3:g} ms", stretch, limit, value, _number(value, "{:.3f} ms", 1e3)))
    return found


def _memory(f: Figures) -> list[Bar]:
    side, plain = f.find("edgeadapt", "int8", "sql"), f.find("edgeadapt", "int8")
    file = f.made("edgeadapt", "int8").get("bytes", {}).get("adapter")
    after, before = (f.starts(side, "memory", when, "resident_bytes") for when in ("used another adapter", "used"))
    growth = None if after is None or before is None or not file else (after - before) / file
    resident = f.starts(plain, "memory", "loaded", "resident_bytes")
    load = f.starts(plain, "load_s")
    return [
        Bar("Memory per further resident adapter / its file", "≤ 1.1 ×", "mapped", 1.1, growth,
            _number(growth, "{:.2f} ×")),
        Bar("RSS after load, int8", "≤ 188 MB", "≤ 1.1 × weights", 188e6, resident,
            _number(resident, "{:.0f} MB", 1 / MB)),
        Bar("Load, warm file cache, int8", "≤ 0.3 s", "≤ 0.1 s", 0.3, load, _number(load, "{:.2f} s")),
        Bar("Adapter file, r=16 all-linear (PEFT's, float16: 9.82 MB)", "≤ 9.82 MB", "≤ 4.9 MB", 9.824e6, file,
            _number(file, "{:.2f} MB", 1 / MB)),
    ]  # fmt: skip


def _promotion(f: Figures) -> list[Bar]:
    extras = f.result.get("extras", {})
    found = []
    for scheme in ("int4", "int8"):
        patch = f.made("edgeadapt", scheme).get("said", {}).get("patches", {}).get("sql")
        more = None if patch is None else patch["bytes"] / patch["entropy_bytes"]
        shown = "–" if patch is None else f"{patch['bytes'] / MB:.2f} MB, {more:.2f} ×"
        found.append(Bar(f"Code patch of an adapter, {scheme}, / its entropy", "≤ 1.3 ×", "≤ 1.1 ×", 1.3, more, shown))
    for scheme in ("int8", "int4"):
        seconds = (extras.get(f"promotion_{scheme}") or {}).get("seconds")
        what = f"Promotion from slots, in the background, {scheme}"
        found.append(Bar(what, "≤ 1.5 s", "≤ 0.5 s", 1.5, seconds, _number(seconds, "{:.2f} s")))
    for scheme in ("int8", "int4"):
        batch = extras.get(f"mixed_batch_{scheme}")
        stat = None if batch is None else ratio(*(dict(enumerate(batch[kind])) for kind in ("own", "one")))
        slower = less_one(stat)
        what = f"16 rows with 16 adapters, slower than 16 rows with one, {scheme}"
        found.append(Bar(what, "≤ 22 %", "≤ 5 %", 0.22, _median(slower), percent(slower)))
    return found


def _quality(f: Figures) -> list[Bar]:
    found = []
    for state in (None, "sql"):
        quality = f.quality(f.find("edgeadapt", "int4", state))
        own = "base" if state is None else f"adapter {state}"
        kl, top1 = quality.get("mean_kl"), quality.get("top1")
        found += [
            Bar(f"int4 quality, {own}: mean KL", "≤ 0.02", "≤ 0.01", 0.02, kl, _number(kl, "{:.4f}")),
            Bar(f"int4 quality, {own}: top-1", "≥ 90 %", "", 0.9, top1, _number(top1, "{:.1%}"), above=True),
        ]
    return found


def _costs(f: Figures, architectures: Mapping[str, Any] | None) -> list[Bar]:
    made, add = (f.result.get("extras", {}).get(key, {}) for key in ("export", "add"))
    cpu, peak, added = made.get("cpu_s"), made.get("peak_bytes"), add.get("cpu_s")
    worst = (
        max((v for row in architectures["rows"] for v in row["parity"].values()), default=None)
        if architectures
        else None
    )
    return [
        Bar("Export, SmolLM2 and 2 adapters to int8, CPU", "≤ 46 s", "≤ 20 s", 46, cpu, _number(cpu, "{:.0f} s")),
        Bar("the same, peak memory", "≤ 1.7 GB", "≤ 1.2 GB", 1.7e9, peak, _number(peak, "{:.2f} GB", 1e-9)),
        Bar("Adding an adapter to a bundle, CPU, no torch", "≤ 2 s", "≤ 0.5 s", 2, added, _number(added, "{:.1f} s")),
        Bar("float32 parity with PEFT, worst architecture", "≤ 1e-4", "1e-5", 1e-4, worst, _number(worst, "{:.1e}")),
    ]


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "–" if value is None else form.format(value * scale)
