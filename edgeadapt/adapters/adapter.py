"""What was trained: an adapter as saved, and the same adapter resolved against a base.

Two nouns, in the order in which data walks:

- `Adapter`: one adapter's files, read lazily and checked; nothing about the base is known yet.
- `ResolvedAdapter`: the same adapter as plain arrays for a few mechanisms, at named modules of a base.

At a module with input x and output y a resolved adapter computes

    y' = (W (x * input_gain) + b + (x A) B) * gain + offset

with every term optional, where y = W x + b. Scaling (alpha / r and its variants) is folded into B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeadapt.slots import BottleneckKind

Array = NDArray[Any]
ModuleType = Literal["linear", "conv1d", "conv2d", "embedding", "norm", "other"]


@dataclass(frozen=True)
class TensorRef:
    """One tensor in a file, not yet read.

    `dtype` is a safetensors name ("F32", "F16", "BF16"); `read()` returns float32[shape] (integers as saved).
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: Callable[[], Array]


@dataclass(frozen=True)
class BaseReference:
    """The base that an adapter says it was trained on.

    `fingerprint` maps a base parameter's name to the SHA-256 of its float32 bytes, from the
    `base_fingerprint.json` beside the adapter (written by `edgeadapt.stamp_base`), or is None.
    `quantization` is "nf4" if the adapter is known to have been trained on an NF4 base.
    """

    name: str | None
    revision: str | None = None
    fingerprint: Mapping[str, str] | None = None
    quantization: str | None = None


@dataclass(frozen=True)
class Adapter:
    """One trained adapter as saved.

    `kind` is a file name in `edgeadapt/adapters/kinds`; `layout` names the library whose files these are
    ("peft"); `tensors` is keyed by the normalized key: module path in the base + parameter
    ("model.layers.0.self_attn.q_proj.lora_A.weight"), without library prefixes or adapter names. `task_id` says which
    task of several in one file this is, or is None.
    """

    name: str
    path: Path
    kind: str
    layout: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    base: BaseReference
    warnings: tuple[str, ...] = ()
    task_id: int | None = None


@dataclass(frozen=True)
class TargetModule:
    """A module of the base that an adapter may change, as far as numpy needs to know it.

    `weight_shape` is torch's own: linear [out, in], conv1d (GPT-2) [in, out], conv2d [out, in/groups, kh, kw],
    embedding [num_embeddings, dim], norm [dim]. `weight()` and `bias()` give float32 arrays in that layout, or are
    None where the values are not at hand (in a bundle) or the module has none (`has_bias`).
    `digest` is the SHA-256 of the weight's float32 bytes. `output_scale` is what an embedding multiplies its rows by
    (`embed_scale` of Gemma 3's or BART's "ScaledWordEmbedding"), or None for a module that does no such thing.
    """

    path: str
    type: ModuleType
    class_name: str
    weight_shape: tuple[int, ...]
    in_features: int
    out_features: int
    has_bias: bool
    digest: str
    groups: int = 1
    output_scale: float | None = None
    weight: Callable[[], Array] | None = field(default=None, compare=False)
    bias: Callable[[], Array] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Effective:
    """What a module of the base computes with an adapter inside: its weight and bias in effect.

    weight: float32 in torch's own layout; bias: float32[out], or None where there is none
    low_rank: where it is known, A float32[in, rank] and B float32[rank, out] whose product is added to the weight
        before the outputs are scaled
    """

    weight: Array
    bias: Array | None = None
    low_rank: tuple[Array, Array] | None = None


class Library(Protocol):
    """The library that saved an adapter, at work on the base, where torch is at hand.

    For adapters whose effect is read off the library's own forward instead of computed from their tensors.
    """

    def effective(self, adapter: Adapter) -> Mapping[str, Effective]:
        """Return every module of the base that computes something else with the adapter inside, by its path."""
        ...

    def past(self, adapter: Adapter) -> tuple[tuple[Array, Array], ...]:
        """Return the key and value that the adapter puts before each layer's own, float32[heads, tokens, dim]."""
        ...


@dataclass(frozen=True)
class SiteUpdate:
    """What an adapter does at one module: y' = (W (x * input_gain) + b + (x A) B) * gain + offset.

    a: float32[in, rank] (embedding: float32[num_embeddings, rank]; conv2d: float32[rank, in, kh, kw], of all groups)
    b: float32[rank, out] (conv2d: float32[out, rank, 1, 1]), scaling folded in
    gain: float32[out] or None; offset: float32[out] or None
    input_gain: float32[in] or None, at linear and conv1d modules alone
    """

    a: Array | None = None
    b: Array | None = None
    gain: Array | None = None
    offset: Array | None = None
    input_gain: Array | None = None

    @property
    def terms(self) -> dict[str, Array]:
        """The arrays that are there, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @property
    def rank(self) -> int:
        """The low-rank term's rank, 0 where there is none."""
        if self.b is None:
            return 0
        return int(self.b.shape[1] if self.b.ndim == 4 else self.b.shape[0])


Reads = Literal["output", "residual", "sum", "norm"]
"""What a bottleneck reads, where a module's output y has the residual r added to it next: y, r, y + r, or the norm of
y + r that the base computes."""
Activation = Literal["relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "leaky_relu", "quick_gelu", "linear"]


@dataclass(frozen=True)
class Bottleneck:
    """A small network beside the base: y' = y + f(n(v) down + down_bias) up + up_bias at the module `site`.

    v is what it `reads`; f is the `activation`; n is v, or v less its mean and over its standard deviation where it is
    `normalized`. Scalings, and gain and offset of a norm of its own, are folded in.

    Bottlenecks of one `stage` read the same y; those of the next read it with these added.

    With a key it is an attention over n bottlenecks (AdapterFusion), whose arrays have a first axis more, and a second
    for the tokens in biases: y' = y + sum over i of softmax(s)_i (h_i up_i + up_bias_i), with h_i = f(n(v) down_i +
    down_bias_i) and the score s_i = [v, 1] . (h_i key_i + key_bias_i).

    down: float32[features, width]; down_bias: float32[width]; up: float32[width, features]; up_bias: float32[features]
    key: float32[n, width, features + 1] or None; key_bias: float32[n, 1, features + 1] or None
    """

    site: str
    reads: Reads
    activation: Activation
    normalized: bool
    down: Array
    down_bias: Array
    up: Array
    up_bias: Array
    stage: int = 0
    key: Array | None = None
    key_bias: Array | None = None

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All that was trained, in the order of its kind's terms."""
        keys = (self.key, self.key_bias)
        return (self.down, self.down_bias, self.up, self.up_bias, *(key for key in keys if key is not None))

    @property
    def slot_kind(self) -> BottleneckKind:
        """The kind of slot that it needs."""
        return BottleneckKind(self.reads, self.activation, self.normalized, self.stage, self.key is not None)


@dataclass(frozen=True)
class Branch:
    """A small network beside a module that is no bottleneck: y' = y + form(x, y), x the module's input.

    site: the module; form: what it computes, a file in `edgeadapt/quantize/forms`
    settings: what is the graph's, not the adapter's to choose ({"activation": "relu"}): words and whole numbers
    tensors: what was trained, float32 by the form's names
    """

    site: str
    form: str
    settings: Mapping[str, str | int]
    tensors: Mapping[str, Array]


@dataclass(frozen=True)
class Prefix:
    """What virtual tokens come to: what a decoder's key-value cache holds before the first token, layer by layer.

    keys, values: float32[heads, tokens, dim] per layer; keys after rotary, for the positions 0, 1, ...
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]

    @property
    def tokens(self) -> int:
        """How many positions it takes."""
        return int(self.keys[0].shape[1])


@dataclass(frozen=True)
class ResolvedAdapter:
    """An adapter as arrays, checked complete against a base.

    `sites` maps a module path to its update; `replaced` maps a base parameter's name ("classifier.weight") to its
    new float32 value (modules_to_save), in torch's layout; `prefix` is what every text begins with, or None;
    `bottlenecks` and `branches` are networks beside the base's modules.
    """

    name: str
    kind: str
    sites: Mapping[str, SiteUpdate]
    replaced: Mapping[str, Array]
    prefix: Prefix | None = None
    bottlenecks: tuple[Bottleneck, ...] = ()
    branches: tuple[Branch, ...] = ()

    @property
    def parameter_count(self) -> int:
        """How many numbers the adapter holds."""
        arrays = [x for update in self.sites.values() for x in update.terms.values()]
        prefix = () if self.prefix is None else (*self.prefix.keys, *self.prefix.values)
        of_bottlenecks = [x for bottleneck in self.bottlenecks for x in bottleneck.arrays]
        of_branches = [x for branch in self.branches for x in branch.tensors.values()]
        every = [*arrays, *self.replaced.values(), *prefix, *of_bottlenecks, *of_branches]
        return int(sum(np.size(x) for x in every))
