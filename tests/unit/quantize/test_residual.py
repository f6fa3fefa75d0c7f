"""The best low-rank part of a rounding error, in the metric of a layer's inputs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from edgeadapt.bundle.residual import with_residual
from edgeadapt.quantize.gptq import DAMPING
from edgeadapt.quantize.residual import low_rank
from edgeadapt.slots import Slot

RNG = np.random.default_rng(4)
ERROR = RNG.standard_normal((24, 40)).astype(np.float32)
SAMPLES = (RNG.standard_normal((300, 40)) * np.linspace(3, 0.1, 40)).astype(np.float32)
MOMENT = SAMPLES.T @ SAMPLES / len(SAMPLES)


@pytest.mark.parametrize("moment", [None, MOMENT], ids=["all alike", "weighed"])
@pytest.mark.parametrize("rank", [1, 5, 23])
def test_no_part_of_that_rank_leaves_less(rank: int, moment: np.ndarray | None) -> None:
    metric = np.eye(40) if moment is None else moment + DAMPING * np.trace(moment) / 40 * np.eye(40)
    root = np.linalg.cholesky(metric.astype(np.float64))
    best = float(np.sqrt((np.linalg.svd(ERROR @ root)[1][rank:] ** 2).sum()))

    a, b = low_rank(ERROR, moment, rank)

    assert (a.shape, b.shape, a.dtype, b.dtype) == ((40, rank), (rank, 24), np.float32, np.float32)
    assert float(np.linalg.norm((ERROR - (a @ b).T) @ root)) == pytest.approx(best, rel=0.01)


def test_the_whole_rank_is_the_whole_error() -> None:
    a, b = low_rank(ERROR, MOMENT, 100)
    assert a.shape == (40, 24)
    np.testing.assert_allclose((a @ b).T, ERROR, atol=1e-5)


def test_the_same_arguments_give_the_same_bits() -> None:
    first, again = low_rank(ERROR, MOMENT, 6), low_rank(ERROR.copy(), MOMENT.copy(), 6)
    assert [x.tobytes() for x in first] == [x.tobytes() for x in again]


def test_a_residual_is_scaled_with_the_weight_that_it_is_of() -> None:
    names = {"a": "l.A", "b": "l.B", "input_gain": "l.g"}
    manifest = SimpleNamespace(slots=(Slot("l", ("model",), "linear", 3, 2, names),))
    residual = {"l.A": np.ones((3, 1), np.float32), "l.B": np.ones((1, 2), np.float32)}
    gain = np.array([1.0, 2.0, 3.0], np.float32)
    own = {"l.A": np.zeros((3, 2), np.float32), "l.B": np.zeros((2, 2), np.float32)}
    found = with_residual({"l.g": gain}, residual, manifest)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found["l.A"], gain[:, None])
    found = with_residual({"l.g": gain, **own}, residual, manifest)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found["l.A"], np.column_stack([own["l.A"], gain]))
    np.testing.assert_array_equal(found["l.B"], np.vstack([own["l.B"], residual["l.B"]]))


def test_a_prefix_alone_stays_alone() -> None:
    prefix = {"prefix.0.key": np.ones((1, 2, 3), np.float32)}
    assert with_residual(prefix, {"l.A": np.ones((5, 2))}, manifest=None) == prefix  # type: ignore[arg-type]
