"""The outputs that a bundle must reproduce, computed when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from edgeadapt.adapters.adapter import Adapter, Array
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.reference import adapted_module, model_outputs, output_views

ROWS_AT_ONCE = 4
Shapes = tuple[tuple[str, int], ...]


class LazyOutputs(Sequence[dict[str, Array]]):
    """A model's outputs by name, one dict per case, computed at each access.

    The logits of all cases at once would fill the memory: 1000 positions of 49152 classes are 200 MB per adapter.
    One after the other, up to `ROWS_AT_ONCE` texts of one length are run as a batch, which is a third cheaper.
    """

    def __init__(
        self, base: BaseModel, load: Callable[[], torch.nn.Module], cases: Sequence[Mapping[str, torch.Tensor]]
    ) -> None:
        """Compute nothing yet; `load` gives the model, which is kept only while it runs."""
        self._base, self._load, self._cases = base, load, cases

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, index: Any) -> Any:
        return model_outputs(self._base, self._load(), self._cases[index])

    def __iter__(self) -> Iterator[dict[str, Array]]:
        module = self._load()
        for first, count in self._batches():
            rows = self._cases[first : first + count]
            if count == 1:
                yield model_outputs(self._base, module, rows[0])
                continue
            batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            outputs = output_views(self._base, module, batch)
            for row in range(count):
                # Copies: a view would keep the whole batch's logits alive while the next batch is run.
                yield {name: array[row : row + 1].copy() for name, array in outputs.items()}
            del outputs

    def _batches(self) -> Iterator[tuple[int, int]]:
        """Yield (first case, how many cases) of runs that can be one batch: single texts of one length."""
        first = 0
        while first < len(self._cases):
            shapes = _text_shapes(self._cases[first])
            count = 1
            while shapes and count < ROWS_AT_ONCE and self._same(first + count, shapes):
                count += 1
            yield first, count
            first += count

    def _same(self, index: int, shapes: Shapes) -> bool:
        return index < len(self._cases) and _text_shapes(self._cases[index]) == shapes


def _text_shapes(case: Mapping[str, torch.Tensor]) -> Shapes:
    """Return the shapes of a single text's inputs; none for anything else, whose axis 0 may not be a batch."""
    if not case.keys() <= {"input_ids", "attention_mask", "token_type_ids"}:
        return ()
    single = all(tensor.ndim == 2 and len(tensor) == 1 for tensor in case.values())
    return tuple((name, tensor.shape[1]) for name, tensor in case.items()) if single else ()


def original_outputs(
    base: BaseModel, adapters: Sequence[Adapter], cases: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str | None, LazyOutputs]:
    """Return the base's outputs under None and each adapter's, unmerged in the library that saved it, by its name.

    Iterating over the outputs raises a MergeError if the adapter's library is unknown or did not load it completely.

    Args:
        base: its weights are shared by all the models, none is copied.
        adapters: each at its own name.
        cases: keyword arguments of the forward.
    """
    found: dict[str | None, LazyOutputs] = {None: LazyOutputs(base, lambda: base.module, cases)}
    for adapter in adapters:
        found[adapter.name] = LazyOutputs(base, partial(adapted_module, base, adapter), cases)
    return found
