"""What a slots graph gives beside the model's answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgeadapt.runtime.inputs import checked_inputs
from edgeadapt.runtime.ort import Tensor
from edgeadapt.slots import BranchSlot

if TYPE_CHECKING:
    from edgeadapt.runtime.session import Session

Array = NDArray[Any]


def features_of(session: Session, slot: BranchSlot, inputs: Mapping[str, Any]) -> Array:
    """Return the features that a cache of examples compares, float32[examples, features] of length 1.

    Args:
        session: an adapter with this branch is active.
        slot: the cache's.
        inputs: arrays by input name.

    Raises:
        SessionError: naming what is expected, for an unknown or missing input, a wrong dtype, rank or length.
    """
    binding = session.active.fresh_binding(slot.graphs[0])
    for name, array in checked_inputs(inputs, binding.graph.inputs).items():
        binding.set_input(name, Tensor(array))
    binding.allocate_output(slot.outputs["features"])
    return binding.run()[slot.outputs["features"]]
