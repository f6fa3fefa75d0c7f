"""Seconds per decoded token as nodes, bytes and arithmetic: t = a * nodes + b * bytes + c * flops, none negative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

TERMS = ("nodes", "bytes", "flops")


def fit(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fit the model to points with "name", "seconds" and the three terms; least squares of the relative error.

    Negative costs mean nothing: of all subsets of the terms whose least-squares coefficients are all positive, the one
    with the smallest error is taken, and the other terms get 0.
    """
    seconds = np.array([point["seconds"] for point in points])
    columns = np.array([[float(point[term]) for term in TERMS] for point in points]) / seconds[:, None]
    best: tuple[float, NDArray[np.float64]] | None = None
    for count in range(1, len(TERMS) + 1):
        for chosen in combinations(range(len(TERMS)), count):
            coefficients = np.zeros(len(TERMS))
            coefficients[list(chosen)] = np.linalg.lstsq(columns[:, chosen], np.ones(len(points)), rcond=None)[0]
            error = float(np.square(columns @ coefficients - 1).mean())
            if (coefficients >= 0).all() and (best is None or error < best[0]):
                best = error, coefficients
    assert best is not None  # one term alone is always positive: terms and seconds are
    found = best[1]
    predicted = columns @ found
    return {
        "us_per_node": found[0] * 1e6,
        "bytes_per_s": None if found[1] == 0 else 1 / found[1],
        "flops_per_s": None if found[2] == 0 else 1 / found[2],
        "mean_error": float(np.abs(predicted - 1).mean()),
        "max_error": float(np.abs(predicted - 1).max()),
        "points": [
            {"name": point["name"], "seconds": point["seconds"], "predicted_s": float(share * point["seconds"])}
            for point, share in zip(points, predicted, strict=True)
        ],
    }
