"""`edgeadapt predict`: what a bundle would need on a device that is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgeadapt.cli import output
from edgeadapt.cli.options import BundlePath, Json

if TYPE_CHECKING:
    from edgeadapt.profiling.predict import Estimate, MemoryEstimate


def predict(
    *,
    bundle: BundlePath,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="See `edgeadapt devices`; or a .toml file.")
    ],
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="NAME", help="The active adapter.", show_default="the bare base"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of a prompt, or of a text.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 1,
    json: Json = False,
) -> None:
    """Predict speed and memory on a device from its file alone: nothing is run. See docs/benchmarks/prediction.md."""
    from edgeadapt.fields import to_mapping
    from edgeadapt.profiling.predict import predict as predicted_for

    found = predicted_for(bundle, device=device, adapter=adapter, prompt_tokens=prompt_tokens, batch_size=batch_size)
    if json:
        output.result_json(to_mapping(found))
        return
    unit = "new token" if found.ttft_s is not None else "run"
    rows = [
        _row(f"time to first token ({prompt_tokens} prompt tokens)", found.ttft_s),
        _row(f"latency per {unit}", found.latency_s),
        _memory_row(found.memory),
    ]
    output.table(f"{bundle} on {found.device.title}: predicted, not measured", [row for row in rows if row])
    for assumption in found.assumptions:
        output.warning(f"assumed: {assumption}")


def _row(name: str, value: Estimate | None) -> dict[str, str | None] | None:
    if value is None:
        return None
    shares = ", ".join(f"{term} {seconds / value.value:.0%}" for term, seconds in value.terms.items())
    between = f"{value.low * 1e3:.3g} to {value.high * 1e3:.3g} ms"
    return {
        "figure": name, "predicted": f"{value.value * 1e3:.3g} ms", "between": between, "bound_by": value.bound_by,
        "made_of": shares,
    }  # fmt: skip


def _memory_row(value: MemoryEstimate | None) -> dict[str, str | None]:
    if value is None:
        return {"figure": "memory after a run", "predicted": "not known for this precision"}
    made_of = ", ".join(f"{term} {size / 1e6:.0f} MB" for term, size in value.terms.items() if size)
    between = f"{value.low / 1e6:.0f} to {value.high / 1e6:.0f} MB"
    return {
        "figure": "memory after a run", "predicted": f"{value.value / 1e6:.0f} MB", "between": between,
        "made_of": made_of,
    }  # fmt: skip
