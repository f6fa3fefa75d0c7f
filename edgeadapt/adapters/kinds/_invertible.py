"""Invertible adapters of AdapterHub (MAD-X): a NICE coupling behind the embeddings.

The halves x1, x2 of an embedding become y1 = x1 + F(x2) and y2 = x2 + G(y1) with F and G two linear layers and an
activation between: two bottlenecks, one behind the other, each with zeros for the half that it does not read or write.
With a plugin interface the library also puts the inverse before a language model's head: x2 = y2 - G(y1), then
x1 = y1 - F(x2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

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
    ("embed_tokens", "output"),  # Llama, Mistral, and most that have a plugin interface
)
_LAST_NORMS = ("norm", "final_layernorm")


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
    nets = _nets({name: tensor.read() for name, tensor in parts.items()}, modules[place[0]].out_features)
    activation = activation_of(adapter.config)
    forth = tuple(Bottleneck(*place, activation, False, *nets[net], stage=stage) for stage, net in enumerate("FG"))
    if "interface" not in adapter.config or "lm_head" not in modules:
        return forth
    norm = next((path for name in _LAST_NORMS if (path := move.to_base(f"{model}{name}")) in modules), None)
    if norm is None:
        raise AdapterError(
            "the adapter has an invertible part, whose inverse the library puts before the language model's head; the "
            f"norm before that is not known in {base_label(base_name)}",
            hint="train it with inv_adapter=None",
        )
    return (*forth, *_inverse(forth, norm))


def _inverse(forth: tuple[Bottleneck, ...], norm: str) -> tuple[Bottleneck, ...]:
    """Return what undoes a coupling, behind the module `norm`."""
    return tuple(
        replace(one, site=norm, reads="output", up=-one.up, up_bias=-one.up_bias, stage=stage)
        for stage, one in enumerate(reversed(forth))
    )


def _nets(values: Mapping[str, Array], features: int) -> dict[str, tuple[Array, Array, Array, Array]]:
    """Return down, down_bias, up and up_bias of F and G, over all of an embedding.

    Raises:
        AdapterError: a shape does not fit.
    """
    half = features // 2
    first, second = slice(0, half), slice(half, features)
    found: dict[str, tuple[Array, Array, Array, Array]] = {}
    for net, read, written in (("F", second, first), ("G", first, second)):
        narrow, wide, bias = (values[f"{net}.{part}"] for part in ("0.weight", "2.weight", "2.bias"))
        width, inputs, outputs = len(values[f"{net}.0.bias"]), len(range(features)[read]), len(range(features)[written])
        if (narrow.shape, wide.shape, bias.shape) != ((width, inputs), (outputs, width), (outputs,)):
            raise AdapterError(
                f"the invertible part's {net} has the shapes {list(narrow.shape)} and {list(wide.shape)}, an embedding "
                f"of {features} needs [{width}, {inputs}] and [{outputs}, {width}]",
                hint="the adapter's files do not belong together, or give the base that the adapter was trained on",
            )
        down, up = np.zeros((features, width), np.float32), np.zeros((width, features), np.float32)
        up_bias: Array = np.zeros(features, np.float32)
        down[read], up[:, written], up_bias[written] = narrow.T, wide.T, bias
        found[net] = (down, values[f"{net}.0.bias"].astype(np.float32), up, up_bias)
    return found
