"""An adapter's prefix in its file: tensors `prefix.LAYER.key` and `prefix.LAYER.value`, [heads, tokens, dim] each.

They are no inputs of a graph: a session writes them into the rows of its key-value cache before the first token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from edgeadapt.adapters.adapter import Prefix
from edgeadapt.bundle.manifest import Manifest
from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import BundleError
from edgeadapt.fields import from_mapping

Array = NDArray[Any]

_NAME = re.compile(r"prefix\.(0|[1-9]\d{0,4})\.(key|value)")
_HINT = "check that the adapter was trained on this bundle's base"


def is_prefix_tensor(name: str) -> bool:
    """Tell whether a tensor of an adapter's file is part of a prefix."""
    return _NAME.fullmatch(name) is not None


def prefix_tensors(prefix: Prefix) -> dict[str, Array]:
    """Return a prefix as the tensors of an adapter's file."""
    keys = {f"prefix.{layer}.key": value for layer, value in enumerate(prefix.keys)}
    return keys | {f"prefix.{layer}.value": value for layer, value in enumerate(prefix.values)}


def prefix_of(name: str, tensors: Mapping[str, Array]) -> Prefix | None:
    """Return the prefix among the tensors of an adapter's file, None if there is none.

    Raises:
        BundleError: if a layer's key or value is missing.
    """
    found = [key for key in tensors if is_prefix_tensor(key)]
    if not found:
        return None
    layers = 1 + max(int(key.split(".")[1]) for key in found)
    if layers > len(found):  # a name may claim any number of layers
        layers = 1 + len(found)
    wanted = [f"prefix.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise BundleError(
            f"adapter {name!r} has a prefix without {missing[0]!r}",
            hint="the adapter's file is damaged or from elsewhere; remove the adapter and add it again",
        )
    return Prefix(tuple(tensors[key] for key in wanted[0::2]), tuple(tensors[key] for key in wanted[1::2]))


def check_prefix(name: str, prefix: Prefix, manifest: Manifest) -> None:
    """Refuse a prefix that this bundle's decoder cannot begin with; values are not looked at.

    Raises:
        BundleError: if there is no decoder alone, or it has other layers, heads or dimensions, or no room.
    """
    if manifest.generation is None or "encoder" in manifest.graphs:
        raise BundleError(
            f"adapter {name!r} begins the text with virtual tokens, and this bundle's model is no decoder-only "
            "language model, whose key-value cache could begin with them",
            hint="use such adapters with decoder-only language models",
        )
    spec = from_mapping(DecoderSpec, manifest.generation, "manifest.json: generation", BundleError)
    if len(prefix.keys) != spec.cache_layers:
        raise BundleError(
            f"adapter {name!r} has a prefix for {len(prefix.keys)} layers, this base has {spec.cache_layers}",
            hint=_HINT,
        )
    wanted = (spec.cache_heads, prefix.tokens if prefix.keys[0].ndim == 3 else "tokens", spec.cache_head_dim)
    for key, value in prefix_tensors(prefix).items():
        if value.shape != wanted:
            raise BundleError(
                f"adapter {name!r}: {key!r} has the shape {list(value.shape)}, this base needs "
                f"[{', '.join(map(str, wanted))}]",
                hint=_HINT,
            )
    if not 0 < prefix.tokens < spec.max_length:
        raise BundleError(
            f"adapter {name!r} begins every text with {prefix.tokens} virtual tokens, and this model holds "
            f"{spec.max_length} tokens",
            hint="train it with fewer virtual tokens, or export the bundle with a larger --max-length",
        )


def check_prefix_tokens(name: str, tensors: Mapping[str, Array], manifest: Manifest) -> None:
    """Refuse an adapter's file whose prefix is not as long as the manifest says: sessions make room for that much.

    Raises:
        BundleError: naming both lengths.
    """
    prefix = prefix_of(name, tensors)
    found, wanted = 0 if prefix is None else prefix.tokens, manifest.adapters[name].prefix_tokens
    if found != wanted:
        raise BundleError(
            f"adapter {name!r} has a prefix of {found} tokens, the manifest says {wanted}",
            hint="the adapter's file is damaged or from elsewhere; remove the adapter and add it again",
        )
