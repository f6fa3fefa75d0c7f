"""How far a side's next-token distributions are from the float32 reference's. numpy only: every child imports it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def agreement(reference: NDArray[np.float32], measured: NDArray[np.float32]) -> dict[str, Any]:
    """KL(reference || measured) in nats and top-1 agreement over positions; both float32[positions, vocab]."""
    if reference.shape != measured.shape:
        raise ValueError(
            f"logits {list(measured.shape)} cannot be compared with the reference's {list(reference.shape)}"
        )
    log_p, log_q = _log_softmax(reference), _log_softmax(measured)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    same = reference.argmax(axis=-1) == measured.argmax(axis=-1)
    return {"mean_kl": float(kl.mean()), "max_kl": float(kl.max()), "top1": float(same.mean()), "positions": len(kl)}


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
