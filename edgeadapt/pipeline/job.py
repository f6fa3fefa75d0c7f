"""What every stage of an export reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgeadapt.adapters.adapter import Adapter, ResolvedAdapter
from edgeadapt.bundle.manifest import Pruning
from edgeadapt.memory import give_back
from edgeadapt.quality.calibration import Calibration, split
from edgeadapt.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from edgeadapt.merging.base_model import BaseModel

Array = NDArray[Any]
TOKENS_PER_TEXT = 64


@dataclass(frozen=True)
class Job:
    """What every stage reads. After a merge: the merged base, its adapter only as the reference.

    rest: drops what is not needed now from memory: freed memory, and weights that are read again from their file
    """

    recipe: Recipe
    base: BaseModel
    adapters: Sequence[Adapter]
    resolved: Sequence[ResolvedAdapter]
    samples: Calibration
    original: BaseModel | None = None
    merge_record: Mapping[str, Any] | None = None
    prunings: Mapping[str, Pruning] = field(default_factory=dict)
    rest: Callable[[], None] = give_back

    @property
    def measured(self) -> Calibration:
        """The samples of the quality table: none that the quantization was calibrated on, where there are enough."""
        return split(self.samples)[1] if self.calibrates or self.recipe.kv_cache == "int8" else self.samples

    @property
    def calibrates(self) -> bool:
        """Whether the quantization is fitted to samples: the user's, or the built-in texts for a model of text."""
        return self.recipe.quantize == "int4" and (self.recipe.calibrate is not None or _reads_text(self))

    @property
    def swappable(self) -> Sequence[ResolvedAdapter]:
        """The adapters that get slots."""
        return () if self.recipe.merge else self.resolved

    @property
    def replaced(self) -> tuple[str, ...]:
        """Parameters that adapters replace whole."""
        return tuple(sorted({name for adapter in self.swappable for name in adapter.replaced}))

    @property
    def prefix_tokens(self) -> int:
        """Positions that inputs must leave to adapters' virtual tokens."""
        return max([0, *(adapter.prefix.tokens for adapter in self.resolved if adapter.prefix is not None)])

    @property
    def flexible(self) -> tuple[str, ...]:
        """Replaced parameters whose class count may differ between adapters: heads that the base does not have."""
        parameters = dict(self.base.module.named_parameters(remove_duplicate=False))
        return tuple(
            name
            for name in self.replaced
            if name in self.base.untrained
            or any(
                tuple(parameters[name].shape) != a.replaced[name].shape for a in self.swappable if name in a.replaced
            )
        )


def arrays_of(cases: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, Array]]:
    """Return cases as numpy arrays."""
    return [{name: tensor.numpy() for name, tensor in case.items()} for case in cases]


def _reads_text(job: Job) -> bool:
    """Return whether texts are all that the model needs to run on: no pixels or sounds, which would be noise."""
    if "tokenizer.json" not in job.base.assets or not job.samples.texts:
        return False
    cases = cases_of(job, dataclasses.replace(job.samples, texts=job.samples.texts[:1]), 1)
    return not any(tensor.is_floating_point() for case in cases for tensor in case.values())


def cases_of(job: Job, samples: Calibration, tokens_per_text: int) -> list[dict[str, torch.Tensor]]:
    """Return the inputs that samples give for the job's base, at most so many tokens each."""
    from edgeadapt.export.cases import sample_cases

    return sample_cases(
        job.base, samples.texts, samples.arrays, tokens_per_text=tokens_per_text, reserved=job.prefix_tokens
    )
