"""What may be shipped: the user's limits, and one plain sentence for a model that quantizing has ruined."""

from __future__ import annotations

from collections.abc import Sequence

from edgeadapt.errors import QuantizeError
from edgeadapt.quality.quality import QualityRow

RUINED_TOP1 = 0.85
"""Below it a greedy answer leaves the original's after some six tokens (1 / 0.15): it is another model's answer."""
RUINED_KL = 0.1
"""Mean nats; 8-bit weights cost some 0.005, and good 4-bit ones less than 0.05."""
RUINED_COSINE = 0.95
"""Below it neighbours in a search change places by the dozen."""
ENOUGH_POSITIONS = 40
"""With fewer, a few ties that fall the other way would sink the top-1 share below the limit."""

_COLUMNS = ("adapter", "scheme", "positions", "mean KL", "max KL", "top-1", "cosine", "accuracy", "torch accuracy")


def gate(rows: Sequence[QualityRow], *, max_kl: float | None = None, min_top1: float | None = None) -> None:
    """Return if every row is within the limits.

    Args:
        rows: from `measure_quality`.
        max_kl: the largest allowed mean KL divergence in nats, None for any.
        min_top1: the smallest allowed share of positions with the same most likely token or class, None for any.

    Raises:
        QuantizeError: with the whole table, if a row breaks a limit or has no such figure.
    """
    broken = [text for row in rows for text in _broken(row, max_kl, min_top1)]
    if broken:
        cache = "a key-value cache in float32, " if any(row.mode is not None for row in rows) else ""
        raise QuantizeError(
            f"the quality gate fails: {'; '.join(broken)}\n{table(rows)}",
            hint=f"use {cache}a scheme with more bits, exceptions (keep), --calibrate FILE for int4, or wider limits",
        )


def _broken(row: QualityRow, max_kl: float | None, min_top1: float | None) -> list[str]:
    name = _name(row)
    broken = []
    for limit, value, figure in ((max_kl, row.mean_kl, "mean KL"), (min_top1, row.top1, "top-1 agreement")):
        if limit is not None and value is None:
            broken.append(f"{name} has no {figure}, because its outputs are no logits")
    if max_kl is not None and row.mean_kl is not None and not row.mean_kl <= max_kl:
        broken.append(f"{name} has a mean KL of {row.mean_kl:.4g}, more than {max_kl:g}")
    if min_top1 is not None and row.top1 is not None and not row.top1 >= min_top1:
        broken.append(f"{name} has a top-1 agreement of {row.top1:.4g}, less than {min_top1:g}")
    return broken


def verdict(rows: Sequence[QualityRow], *, calibrated: bool = False) -> str | None:
    """Return one plain sentence if quantizing ruined the base or an adapter, else None.

    Ruined means: the most likely token or class changes at more than 15 % of at least 40 positions, or the mean KL
    divergence is above 0.1, or the mean cosine similarity is below 0.95.

    Args:
        rows: from `measure_quality`.
        calibrated: whether the user gave texts to calibrate with.
    """
    ruined = [row for row in rows if _is_ruined(row)]
    if not ruined:
        return None
    row = max(ruined, key=lambda item: (1 - (item.top1 or 0.0), item.mean_kl or 0.0, 1 - (item.cosine or 0.0)))
    advice = _advice(row.scheme, calibrated=calibrated)
    if row.mode is not None:
        return f"{_damage(row)}: this model is ruined; leave out --kv-cache, and if that does not help, {advice}"
    return f"{_damage(row)}: this model is ruined at {row.scheme}; {advice}"


def _is_ruined(row: QualityRow) -> bool:
    changed = row.top1 is not None and row.top1 < RUINED_TOP1 and row.positions >= ENOUGH_POSITIONS
    shifted = row.mean_kl is not None and row.mean_kl > RUINED_KL
    turned = row.cosine is not None and row.cosine < RUINED_COSINE
    return changed or shifted or turned


def _damage(row: QualityRow) -> str:
    of = "" if row.adapter is None else f" of adapter {row.adapter!r}"
    scheme = row.scheme if row.mode is None else f"{row.scheme} with a key-value cache in int8"
    if row.top1 is not None and row.mean_kl is not None:
        return (
            f"{scheme} changes the most likely answer{of} at {1 - row.top1:.0%} of positions "
            f"(mean KL {row.mean_kl:.2g})"
        )
    return f"{scheme} turns the output vectors{of} to a mean cosine of {row.cosine:.3f}"


def _advice(scheme: str, *, calibrated: bool) -> str:
    if scheme == "int4":
        return "use int8" if calibrated else "use int8, or --calibrate FILE"
    return "use fp16" if scheme == "int8" else "use none"


def table(rows: Sequence[QualityRow]) -> str:
    """Return the rows as plain text, one line each, columns aligned."""
    lines = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(row: QualityRow) -> tuple[str, ...]:
    return (
        " ".join(["(base)" if row.adapter is None else row.adapter, *_form(row)]),
        row.scheme,
        str(row.positions),
        _figure(row.mean_kl, ".5f"),
        _figure(row.max_kl, ".4f"),
        _figure(row.top1, ".1%"),
        _figure(row.cosine, ".5f"),
        _figure(row.accuracy, ".1%"),
        _figure(row.reference_accuracy, ".1%"),
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _name(row: QualityRow) -> str:
    name = "the base" if row.adapter is None else f"adapter {row.adapter!r}"
    return f"{name} ({', '.join(_form(row))})" if _form(row) else name


def _form(row: QualityRow) -> list[str]:
    return [*(["promoted"] if row.promoted else []), *([row.mode] if row.mode is not None else [])]
