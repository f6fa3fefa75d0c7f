"""The charts of a report, as cards of HTML: a list for each kind of chart, empty where no profile has its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from edgeadapt.profiling import charts
from edgeadapt.profiling.figures import OperatorTime, Profile
from edgeadapt.profiling.samples import percentile

_MOST_OPERATORS = 8
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def latencies(names: Sequence[str], profiles: Sequence[Profile]) -> list[str]:
    """Return histograms on one common axis for those whose latencies are of one kind and not too far apart."""
    cards = []
    for name, each in zip(names, profiles, strict=True):
        samples = each.samples.get("latency_s")
        if not samples or each.latency_p50_s is None or each.latency_p95_s is None:
            continue
        similar = [max(other.samples["latency_s"]) for other in profiles if _same_kind(each, other)]
        most = max(similar)
        unit = _time_unit(most)
        marks = (("p50", each.latency_p50_s), ("p95", each.latency_p95_s))
        chart = charts.histogram(samples, marks, label=unit, title=f"Latencies of {name}", most=most)
        what = "tokens" if each.prefills else "runs"
        cards.append(_card(name, chart, f"{len(samples)} {what}, in {unit.name}"))
    return cards


def taxes(names: Sequence[str], profiles: Sequence[Profile]) -> list[str]:
    """Return what an adapter costs, active and in place, for each profile; all on one common axis."""
    rows = {name: _tax_rows(each) for name, each in zip(names, profiles, strict=True)}
    ends = [end for found in rows.values() for row in found for end in (1 + row.parts[0][0], *(row.interval or ()))]
    key = _legend(("adapter", "adapter active"), ("idle", "adapters in place, none active"))
    return [
        _card(
            name,
            charts.bars(
                found,
                label=lambda value: f"{value - 1:+.0%}" if value != 1 else "0",
                title=f"Time with adapters against none, {name}",
                zero=1,
                shared=ends,
            ),
            "",
            key,
        )
        for name, found in rows.items()
        if found
    ]


def _tax_rows(profile: Profile) -> list[charts.Bar]:
    tax = profile.adapter_tax
    if tax is None:
        return []
    samples = profile.samples
    rows = []
    for what, ratio, kind, colour in (
        (f"{tax.adapter} active", tax.ratio, "active", "adapter"),
        ("in place, none active", tax.idle_ratio, "idle", "idle"),
    ):
        if ratio is None:
            continue
        pairs = [above / below for above, below in zip(samples[f"tax_{kind}_s"], samples["tax_base_s"], strict=True)]
        middle = (percentile(pairs, 25), percentile(pairs, 75))
        rows.append(charts.Bar(what, ((ratio - 1, colour),), f"{ratio - 1:+.1%}", middle))
    return rows


def memories(names: Sequence[str], profiles: Sequence[Profile]) -> list[str]:
    """Return a line of resident memory for each profile."""
    return [
        _card(
            name,
            charts.line(
                each.memory_timeline,
                x_label=lambda seconds: f"{seconds:.3g} s",
                y_label=_size,
                title=f"Resident memory of {name}",
            ),
            "",
        )
        for name, each in zip(names, profiles, strict=True)
        if len(each.memory_timeline) > 1
    ]


def operators(names: Sequence[str], profiles: Sequence[Profile]) -> list[str]:
    """Return bars of operator types, split into those of the base and those that are there for adapters alone."""
    cards = []
    for name, each in zip(names, profiles, strict=True):
        if not each.operators:
            continue
        total = sum(operator.seconds for operator in each.operators)
        kinds = _by_type(each.operators)
        unit = _time_unit(max(sum(parts) for _, parts in kinds))
        rows = [
            charts.Bar(
                kind,
                ((base, "base"), (adapter, "adapter")) if adapter else ((base, "base"),),
                f"{unit(base + adapter)} {unit.name}, {(base + adapter) / total:.0%}",
            )
            for kind, (base, adapter) in kinds
        ]
        chart = charts.bars(rows, label=unit, title=f"Operators of {name}")
        share = sum(operator.seconds for operator in each.operators if operator.adapter) / total
        key = _legend(("base", "base"), ("adapter", f"for adapters alone: {share:.1%} of the time"))
        cards.append(_card(name, chart, f"in {unit.name}", key))
    return cards


def pareto(names: Sequence[str], profiles: Sequence[Profile]) -> list[str]:
    """Return latency against divergence, a chart for each device, task, workload and adapter that several share.

    An adapter's divergence is from that adapter unquantized, so two adapters' are not held against each other.
    """
    cards = []
    groups: dict[tuple[object, ...], list[tuple[str, Profile]]] = {}
    for name, each in zip(names, profiles, strict=True):
        if each.quality is not None and each.quality.mean_kl is not None and each.latency_p50_s is not None:
            key = (each.device.name, each.adapter, each.host.cpu, each.task, each.workload)
            groups.setdefault(key, []).append((name, each))
    for (device, adapter, *_), members in groups.items():
        if len(members) < 2:
            continue
        places = [(each.latency_p50_s or 0.0, each.quality.mean_kl or 0.0) for _, each in members if each.quality]
        dots = [
            charts.Dot(x, y, name, best=not any(_beats(other, (x, y)) for other in places))
            for (x, y), (name, _) in zip(places, members, strict=True)
        ]
        unit = _time_unit(max(x for x, _ in places))
        chart = charts.scatter(
            dots, x_label=unit, y_label=lambda value: f"{value:.3g}", title=f"Latency against divergence on {device}"
        )
        items = "".join(
            f"<li>{escape(name)}: {escape(each.precision)}, {unit(dot.x)} {escape(unit.name)}, KL {dot.y:.3g},"
            f" {_size(each.sizes.total_bytes)} on disk</li>"
            for dot, (name, each) in zip(dots, members, strict=True)
        )
        about = f"Across: latency p50 in {unit.name}. Up: mean KL from the unquantized model, in nats."
        cards.append(_card(f"{adapter or 'base'} on {device}", chart, about, f"<ol>{items}</ol>"))
    return cards


@dataclass(frozen=True)
class _Unit:
    """Seconds as numbers of a unit."""

    name: str
    seconds: float

    def __call__(self, value: float) -> str:
        return f"{value / self.seconds:.3g}"


def _time_unit(most: float) -> _Unit:
    if most >= 2:
        return _Unit("s", 1.0)
    return _Unit("ms", 1e-3) if most >= 1e-3 else _Unit("µs", 1e-6)


def _size(value: float) -> str:
    for unit, name in _SIZES:
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def _same_kind(one: Profile, other: Profile) -> bool:
    """Whether two profiles' latencies can be seen on one axis."""
    if not other.samples.get("latency_s") or bool(one.prefills) != bool(other.prefills):
        return False
    apart = (one.latency_p50_s or 1.0) / (other.latency_p50_s or 1.0)
    return 1 / 3 < apart < 3


def _beats(other: tuple[float, float], mine: tuple[float, float]) -> bool:
    return other != mine and other[0] <= mine[0] and other[1] <= mine[1]


def _by_type(operators: Sequence[OperatorTime]) -> list[tuple[str, tuple[float, float]]]:
    """Return seconds for the base and for adapters by type, longest first, the rest as one."""
    found: dict[str, tuple[float, float]] = {}
    for each in operators:
        base, adapter = found.get(each.op_type, (0.0, 0.0))
        found[each.op_type] = (base, adapter + each.seconds) if each.adapter else (base + each.seconds, adapter)
    rows = sorted(found.items(), key=lambda row: -sum(row[1]))
    rest = rows[_MOST_OPERATORS:]
    if len(rest) < 2:
        return rows
    together = (sum(parts[0] for _, parts in rest), sum(parts[1] for _, parts in rest))
    return [*rows[:_MOST_OPERATORS], (f"{len(rest)} other types", together)]


def _legend(*entries: tuple[str, str]) -> str:
    keys = "".join(f'<span class="key {kind}"></span>{escape(text)}' for kind, text in entries)
    return f'<div class="legend">{keys}</div>'


def _card(name: str, chart: str, about: str, below: str = "") -> str:
    told = f'<p class="soft">{escape(about)}</p>' if about else ""
    return f'<div class="card"><h3>{escape(name)}</h3>{told}{chart}{below}</div>'
