"""Which channels of a key turn into which as its position grows.

A scale that was measured on short texts must hold at every position: what one channel holds at the beginning of a text,
the other of its pair may hold further on.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeadapt.errors import ExportError
from edgeadapt.merging.base_model import BaseModel

_POSITIONS = (1, 2, 5)


def rotary_partners(base: BaseModel, head_dim: int) -> NDArray[np.bool_]:
    """Return bool[dim, dim]: whether two channels of a key's head are mixed by the rotary embedding (and the diagonal).

    Found by rotating each channel alone with the model's own code, so any pairing will do: halves, neighbours, or some
    of the channels only.

    Raises:
        ExportError: if the model has a rotary embedding that cannot be called in transformers' usual form.
    """
    mixed = np.eye(head_dim, dtype=np.bool_)
    apply = getattr(sys.modules[type(base.module).__module__], "apply_rotary_pos_emb", None)
    found = [module for name, module in base.module.named_modules() if "rotary_emb" in name.rsplit(".", 1)[-1]]
    if apply is None and not found:
        return mixed
    problem: object = "it has no function apply_rotary_pos_emb" if apply is None else "it has no module rotary_emb"
    if apply is not None and found:
        try:
            for module in found:
                mixed |= _partners(module, apply, head_dim)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        else:
            return _closed(mixed)
    raise ExportError(
        f"which channels the rotary embedding of {type(base.module).__name__} mixes cannot be found out: {problem}",
        hint="leave out --kv-cache; a key's range at later positions is not known",
    )


def _partners(module: Any, apply: Any, head_dim: int) -> NDArray[np.bool_]:
    with torch.no_grad():
        cos, sin = module(torch.zeros(1, 1), torch.tensor([_POSITIONS]))
        # [1, heads, positions, dim], one channel per head; some models hand over only the channels that turn
        for size in (head_dim, cos.shape[-1]):
            one_each = torch.eye(size)[None, :, None].expand(-1, -1, len(_POSITIONS), -1)
            try:
                rotated, _ = apply(one_each, one_each, cos, sin)
            except RuntimeError:
                if size == cos.shape[-1]:
                    raise
                continue
            mixed = np.eye(head_dim, dtype=np.bool_)
            mixed[:size, :size] |= (rotated[0] != 0).any(dim=1).numpy()
            return mixed
    raise AssertionError  # the last size was tried or raised


def _closed(mixed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the partners of partners too, both ways."""
    mixed = mixed | mixed.T
    while ((further := mixed @ mixed) != mixed).any():
        mixed = further
    return mixed
