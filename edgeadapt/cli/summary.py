"""A bundle's manifest as people and programs want to see it."""

from __future__ import annotations

import math
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
        "base": {key: base[key] for key in ("name", "revision", "model_type", "quantized_from", "fingerprint")}
        | {"parameters": _parameters(manifest)},
        "merged": manifest.merged,
        "adapters": whole["adapters"],
        "adapter_dtype": manifest.adapter_dtype,
        "slots": len(manifest.slots) + len(manifest.bottlenecks) + len(manifest.branches),
        "graphs": whole["graphs"],
        "quantization": whole["quantization"],
        "parity": whole["parity"],
        "quality": whole["quality"],
        "kv_cache": _kv_cache(manifest),
        "labels": whole["labels"],
        "bytes": {**sizes, "total": sum(sizes.values())},
    }


def show_bundle(bundle: Any, *, as_json: bool, quiet: bool) -> None:
    """Show a bundle: JSON on stdout, or tables on stderr, or nothing."""
    summary = {**summarize(bundle.manifest), "patches": _patches(bundle)}
    if as_json:
        output.result_json({"path": str(bundle.path), **summary})
    elif not quiet:
        _show_tables(str(bundle.path), summary)


def _show_tables(path: str, summary: dict[str, Any]) -> None:
    quantization, parity = summary["quantization"], summary["parity"]
    output.fields(
        path,
        {
            "task": summary["task"],
            "base": summary["base"]["name"],
            "merged": summary["merged"],
            "slots": summary["slots"],
            "key-value cache": summary["kv_cache"],
            "weights": {key: value for key, value in quantization.items() if not isinstance(value, list | dict)},
            "against torch, unquantized": {key: value for key, value in parity.items() if not isinstance(value, list)},
            "size in MB": {role: size / 1e6 for role, size in summary["bytes"].items()},
        },
    )
    whole = summary["base"]["parameters"]
    adapters = [
        {
            "adapter": name,
            **record,
            "parameters": f"{record['parameters']} ({record['parameters'] / whole:.2%})",
            "labels": len(record["labels"]) or None,
            "pruned": _pruned(record["pruned"]),
            "blend": _blended(record["blend"]),
        }
        for name, record in summary["adapters"].items()
    ]
    output.table("Adapters", adapters)
    patches = [{"adapter": name, **found} for name, found in summary["patches"].items()]
    if patches:
        output.table("Patches: what promotion changes in the weights", patches)
    rows = [{**_LEADING, **row, "adapter": row.get("adapter") or "(base)"} for row in summary["quality"]]
    output.table("Quality: quantized, against torch in float32", rows)


def _kv_cache(manifest: Manifest) -> dict[str, Any] | None:
    """Return what a decoder holds keys and values in, and the memory for one token of one text."""
    from edgeadapt.decoder_spec import DecoderSpec
    from edgeadapt.errors import BundleError
    from edgeadapt.fields import from_mapping

    if manifest.generation is None:
        return None
    spec = from_mapping(DecoderSpec, manifest.generation, "manifest.json: generation", BundleError)
    return {"dtype": spec.cache_dtype, "bytes_per_token": spec.cache_bytes_per_token}


def _parameters(manifest: Manifest) -> int:
    """Return how many numbers the weights of the base's modules have; a weight that two modules share counts once."""
    sizes = {module.digest: math.prod(module.weight_shape) for module in manifest.base.modules}
    return sum(sizes.values())


def _patches(bundle: Any) -> dict[str, Any]:
    """Return the size of each adapter's patch, and how small it could be."""
    found = {name: bundle.patch(name) for name in bundle.adapter_names if bundle.has_patch(name)}
    return {
        name: {
            "bytes": bundle.manifest.files[f"adapters/{name}/patch.bin"].size,
            "entropy_bytes": patch.entropy_bytes,
            "codes": patch.codes,
            "changed": patch.changed,
        }
        for name, patch in found.items()
    }


def _pruned(cut: dict[str, Any] | None) -> str | None:
    """Return what was left out of an adapter, in a few words."""
    if cut is None:
        return None
    ranks, sites = (f"{cut[key]} of {cut[key + '_before']} {key}" for key in ("ranks", "sites"))
    return f"{ranks}, {sites}, KL {cut['kl']:.2g}"


def _blended(made: dict[str, Any] | None) -> str | None:
    """Return what an adapter was made of, in a few words."""
    if made is None:
        return None
    parts = ", ".join(f"{part['adapter']} {part['weight']:g}" for part in made["parts"])
    return f"{made['method']} of {parts}; error {made['error']:.2g}"


# The columns that people look at first.
_LEADING: dict[str, Any] = dict.fromkeys(("adapter", "scheme", "mean_kl", "max_kl", "top1"))
