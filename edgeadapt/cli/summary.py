"""A bundle's manifest as people and programs want to see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeadapt.cli import output

if TYPE_CHECKING:
    from edgeadapt.bundle.manifest import Manifest


def summarize(manifest: Manifest) -> dict[str, Any]:
    """Return what a bundle is, holds and was measured to do, ready for JSON."""
    from edgeadapt.fields import to_mapping

    whole = to_mapping(manifest)
    base = whole["base"]
    sizes: dict[str, int] = {}
    for record in manifest.files.values():
        sizes[record.role] = sizes.get(record.role, 0) + record.size
    return {
        "schema": manifest.schema,
        "name": manifest.name,
        "task": manifest.task,
        "base": {key: base[key] for key in ("name", "revision", "model_type", "quantized_from", "fingerprint")},
        "merged": manifest.merged,
        "adapters": whole["adapters"],
        "adapter_dtype": manifest.adapter_dtype,
        "slots": len(manifest.slots),
        "graphs": whole["graphs"],
        "quantization": whole["quantization"],
        "parity": whole["parity"],
        "quality": whole["quality"],
        "labels": whole["labels"],
        "bytes": {**sizes, "total": sum(sizes.values())},
    }


def show_bundle(bundle: Any, *, as_json: bool, quiet: bool) -> None:
    """Show a bundle: JSON on stdout, or tables on stderr, or nothing."""
    summary = summarize(bundle.manifest)
    if as_json:
        output.result_json({"path": str(bundle.path), **summary})
    elif not quiet:
        _show_tables(str(bundle.path), summary)


def _show_tables(path: str, summary: dict[str, Any]) -> None:
    megabytes = {f"{role}_MB": size / 1e6 for role, size in summary["bytes"].items()}
    output.fields(
        path,
        {
            "name": summary["name"],
            "task": summary["task"],
            "base": summary["base"]["name"],
            "merged": summary["merged"],
            "slots": summary["slots"],
            "quantization": {key: _short(value) for key, value in summary["quantization"].items()},
            "parity": {key: _short(value) for key, value in summary["parity"].items()},
            "size": megabytes,
        },
    )
    output.table("Adapters", [{"name": name, **record} for name, record in summary["adapters"].items()])
    output.table("Quality against float32", summary["quality"])


def _short(value: Any) -> Any:
    """Return how many entries a long list or table has, and anything else as it is."""
    return f"{len(value)} entries" if isinstance(value, dict | list) and len(value) > 8 else value
