"""LoRA factors under another library's names to the `Adapter` that peft's files of the same adapter would be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeadapt.adapters.adapter import TensorRef
from edgeadapt.adapters.selection import name_some
from edgeadapt.errors import AdapterError


@dataclass(frozen=True)
class Pair:
    """One module's factors in peft's layouts: y' = y + scale * (x a^T) b^T.

    a: float[rank, in]; b: float[out, rank]; magnitude: float[out] (DoRA) or None
    """

    a: TensorRef
    b: TensorRef
    scale: float
    magnitude: TensorRef | None = None

    @property
    def rank(self) -> int:
        """The inner size of the product."""
        return self.a.shape[0]


def transposed(tensor: TensorRef) -> TensorRef:
    """Return the tensor with its axes in reverse order."""
    return replace(tensor, shape=tensor.shape[::-1], read=lambda: tensor.read().T)


def check_pair(pair: Pair) -> None:
    """Check that two factors make a product, and are numbers.

    Raises:
        AdapterError: they do not.
    """
    for tensor in (pair.a, pair.b, *([] if pair.magnitude is None else [pair.magnitude])):
        if not tensor.dtype.startswith(("F", "BF")):
            raise AdapterError(
                f"tensor {tensor.key!r} in {tensor.file} has dtype {tensor.dtype}",
                hint="save the adapter in float32, float16 or bfloat16",
            )
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2 or pair.a.shape[0] != pair.b.shape[1] or 0 in pair.a.shape:
        raise AdapterError(
            f"tensors {pair.a.key!r} and {pair.b.key!r} in {pair.a.file} are no product of rank r: with r first and "
            f"last their shapes are {list(pair.a.shape)} and {list(pair.b.shape)}",
            hint="copy the file again from where the adapter was trained; only linear layers are read in this layout",
        )


def peft_tensors(pairs: Mapping[str, Pair]) -> dict[str, TensorRef]:
    """Return the tensors of all modules by the names that peft gives them."""
    found = {}
    for module, pair in pairs.items():
        found[f"{module}.lora_A.weight"] = pair.a
        found[f"{module}.lora_B.weight"] = pair.b
        if pair.magnitude is not None:
            found[f"{module}.lora_magnitude_vector"] = pair.magnitude
    return found


def peft_config(pairs: Mapping[str, Pair], *, targets: str | None = None) -> dict[str, Any]:
    """Return the LoraConfig under which peft computes what `pairs` say.

    Args:
        pairs: every module's factors.
        targets: the regular expression of the modules that must have factors; None for those that have.

    Raises:
        AdapterError: some modules have a magnitude and some have none.
    """
    plain = sorted(module for module, pair in pairs.items() if pair.magnitude is None)
    if plain and len(plain) < len(pairs):
        raise AdapterError(
            f"{len(pairs) - len(plain)} modules have a magnitude (DoRA), and {len(plain)} have none: "
            f"{name_some(plain)}",
            hint="the file is damaged or incomplete: copy it again from where the adapter was trained",
        )
    rank, alpha = (
        Counter(values).most_common(1)[0][0]
        for values in ([p.rank for p in pairs.values()], [p.rank * p.scale for p in pairs.values()])
    )
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets or "|".join(re.escape(module) for module in sorted(pairs)),
        "rank_pattern": {re.escape(name): pair.rank for name, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {
            re.escape(name): pair.rank * pair.scale for name, pair in pairs.items() if pair.rank * pair.scale != alpha
        },
        "use_dora": not plain,
    }
