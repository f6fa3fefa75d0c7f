"""The outputs that a bundle must reproduce, computed when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from edgeadapt.adapters.adapter import Adapter, Array
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.reference import adapted_module, model_outputs


class LazyOutputs(Sequence[dict[str, Array]]):
    """A model's outputs by name, one dict per case, computed at each access.

    The logits of all cases at once would fill the memory: 1000 positions of 49152 classes are 200 MB per adapter.
    """

    def __init__(self, base: BaseModel, module: torch.nn.Module, cases: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self._base, self._module, self._cases = base, module, cases

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, index: Any) -> Any:
        return model_outputs(self._base, self._module, self._cases[index])

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return (self[index] for index in range(len(self)))


def original_outputs(
    base: BaseModel, adapters: Sequence[Adapter], cases: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str | None, LazyOutputs]:
    """Return the base's outputs under None and each adapter's, unmerged in the library that saved it, by its name.

    Args:
        base: its weights are shared by all the models, none is copied.
        adapters: each at its own name.
        cases: keyword arguments of the forward.

    Raises:
        MergeError: if an adapter's library is unknown, or it did not load the adapter completely.
    """
    found: dict[str | None, LazyOutputs] = {None: LazyOutputs(base, base.module, cases)}
    for adapter in adapters:
        found[adapter.name] = LazyOutputs(base, adapted_module(base, adapter), cases)
    return found
