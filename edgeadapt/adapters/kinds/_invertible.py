"""Invertible adapters of AdapterHub (MAD-X): a NICE coupling behind the embeddings.

The halves x1, x2 of an embedding become y1 = x1 + F(x2) and y2 = x2 + G(y1) with F and G two linear layers and an
activation between: two bottlenecks, one behind the other, each with zeros for the half that it does not read or write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from edgeadapt.adapters.adapter import Adapter, Array, Bottleneck, Reads, TargetModule, TensorRef
from edgeadapt.adapters.fingerprint import base_label
from edgeadapt.adapters.kinds._bottleneck_config import activation_of, block_of
from edgeadapt.adapters.selection import Move
from edgeadapt.errors import AdapterError

_KEY = re.compile(r"(?P<model>.+\.)?invertible_adapters\.(?P<part>[^.].*)")
_PARTS = frozenset(f"{net}.{layer}.{what}" for net in "FG" for layer in (0, 2) for what in ("weight", "bias"))
# Where embeddings are complete: the last module before the layers, and what the coupling reads there.
_SITES: tuple[tuple[str, Reads], ...] = (
    ("embeddings.LayerNorm", "output"),  # BERT, RoBERTa, DistilBERT
    ("wte", "sum"),  # GPT-2, which adds positions
    ("embed_tokens", "output"),  # Llama, Mistral
)


def is_invertible(key: str) -> bool:
    """Tell whether a normalized key is of an invertible adapter."""
    return _KEY.fullmatch(key) is not None


def check_invertible(adapter: Adapter) -> None:
    """Check that the tensors are those of the settings' block.

    Raises:
        AdapterError: one is missing or too much.
    """
    found = {match["part"]: tensor for key, tensor in adapter.tensors.items() if (match := _KEY.fullmatch(key))}
    wanted = _PARTS if block_of(adapter.config["config"]) else frozenset[str]()
    file = next(iter(adapter.tensors.values())).file
    again = "save the adapter again with save_adapter"
    if missing := wanted - found.keys():
        raise AdapterError(f"tensor 'invertible_adapters.{min(missing)}' is missing in {file}", hint=again)
    if extra := found.keys() - wanted:
        raise AdapterError(f"tensor {found[min(extra)].key!r} in {file} does not fit its config", hint=again)


def resolve_invertible(
    adapter: Adapter, modules: Mapping[str, TargetModule], move: Move, base_name: str | None
) -> tuple[Bottleneck, ...]:
    """Return the coupling as bottlenecks, none if the adapter has none.

    Raises:
        AdapterError: there is no place for it in the base, or a shape does not fit.
    """
    parts: dict[str, TensorRef] = {}
    model = ""
    for key, tensor in adapter.tensors.items():
        if match := _KEY.fullmatch(key):
            parts[match["part"]], model = tensor, match["model"] or ""
    if not parts:
        return ()
    places = [(move.to_base(f"{model}{name}"), reads) for name, reads in _SITES]
    place = next(((site, reads) for site, reads in places if site in modules), None)
    if place is None:
        raise AdapterError(
            f"the adapter has an invertible part behind the embeddings; no such place is known in "
            f"{base_label(base_name)}",
            hint="known are BERT and RoBERTa, DistilBERT, GPT-2, Llama and Mistral; give the base that the adapter was "
            "trained on",
        )
    values = {name: tensor.read() for name, tensor in parts.items()}
    features = modules[place[0]].out_features
    half = features // 2
    first, second = slice(0, half), slice(half, features)
    widths = {net: len(values[f"{net}.0.bias"]) for net in "FG"}
    shapes = {"F": (features - half, half), "G": (half, features - half)}
    for net, (inputs, outputs) in shapes.items():
        found = (values[f"{net}.0.weight"].shape, values[f"{net}.2.weight"].shape)
        if found != ((widths[net], inputs), (outputs, widths[net])) or len(values[f"{net}.2.bias"]) != outputs:
            raise AdapterError(
                f"the invertible part's {net} has the shapes {list(found[0])} and {list(found[1])}, an embedding of "
                f"{features} needs [{widths[net]}, {inputs}] and [{outputs}, {widths[net]}]",
                hint="the adapter's files do not belong together, or give the base that the adapter was trained on",
            )

    def bottleneck(net: str, read: slice, written: slice, stage: int) -> Bottleneck:
        down, up = np.zeros((features, widths[net]), np.float32), np.zeros((widths[net], features), np.float32)
        up_bias: Array = np.zeros(features, np.float32)
        down[read], up[:, written] = values[f"{net}.0.weight"].T, values[f"{net}.2.weight"].T
        up_bias[written] = values[f"{net}.2.bias"]
        terms = (down, values[f"{net}.0.bias"].astype(np.float32), up, up_bias)
        return Bottleneck(*place, activation_of(adapter.config), False, *terms, stage=stage)

    return bottleneck("F", second, first, 0), bottleneck("G", first, second, 1)
