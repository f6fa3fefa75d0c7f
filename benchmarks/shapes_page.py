"""The section on bigger shapes in docs/benchmarks.md, from results/shapes.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bars import percent
from figures import table

TEXT = """Random weights with the shapes of real models, a random LoRA of rank 16 on every linear ({date}, {threads}
threads, medians; `scripts/benchmark shapes`). Export is the whole program, its comparison with torch and its quality
table included."""


def shapes_section(result: Mapping[str, Any] | None) -> str:
    """The section's text."""
    if result is None:
        return "## Bigger shapes\n\nNot measured."
    text = TEXT.format(date=result["date"], threads=result["setting"]["threads"])
    failures = [f"- {row['shape']} {row['scheme']}: {f['message']}" for row in result["rows"] for f in row["failures"]]
    parts = [f"## Bigger shapes\n\n{text}", table([_row(row) for row in result["rows"]]), *failures]
    if result["cost_model"]:
        parts.append(_model(result["cost_model"]))
    return "\n\n".join(parts)


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    export, float32 = row["export"], 4 * row["parameters"]
    peak = "–" if not export else f"{export['peak_bytes'] / 1e9:.1f} ({export['peak_bytes'] / float32:.1f} ×)"
    return {
        "shape": row["shape"],
        "M parameters": f"{row['parameters'] / 1e6:.0f}",
        "scheme": row["scheme"],
        "export CPU s": "–" if not export else f"{export['cpu_s']:.0f}",
        "export peak GB (× float32)": peak,
        "weights MB": "–" if "weights_bytes" not in row else f"{row['weights_bytes'] / 1e6:.0f}",
        "decode tok/s": _speed(row, "plain", "decode"),
        "with adapter": _speed(row, "slots", "decode"),
        "adapter's cost": percent(row["tax"]),
        "prefill tok/s, 512": _speed(row, "plain", "prefill"),
        "prefill with adapter": _speed(row, "slots", "prefill"),
    }


def _speed(row: Mapping[str, Any], form: str, metric: str) -> str:
    found = (row.get(form) or {}).get(metric)
    return "–" if found is None else f"{found['median']:.1f}"


def _model(model: Mapping[str, Any]) -> str:
    bandwidth = "nothing" if model["bytes_per_s"] is None else f"1 s per {model['bytes_per_s'] / 1e9:.1f} GB"
    arithmetic = "nothing" if model["flops_per_s"] is None else f"1 s per {model['flops_per_s'] / 1e9:.0f} GFLOP"
    rows = [
        {
            "point": point["name"],
            "measured ms": f"{point['seconds'] * 1e3:.2f}",
            "model ms": f"{point['predicted_s'] * 1e3:.2f}",
            "error": f"{point['predicted_s'] / point['seconds'] - 1:+.1%}",
        }
        for point in model["points"]
    ]
    return f"""### Cost model

Seconds per decoded token, fitted to the rows above (least squares of the relative error, no negative cost):
**{model["us_per_node"]:.2f} µs per node of the graph + {bandwidth} of weights read + {arithmetic}**; mean error
{model["mean_error"]:.1%}, largest {model["max_error"]:.1%}.

{table(rows)}"""
