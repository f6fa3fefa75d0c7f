"""enroll: what it asks of the library, and what it refuses to ask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def asked(replace, bundle):
    calls = []

    def enroll(opened, name, arrays, classes, **options):
        shapes = {key: value.shape for key, value in arrays.items()}
        calls.append((opened, name, shapes, classes, {k: v for k, v in options.items() if k != "progress"}))
        return bundle

    replace("edgeadapt.enrolment", enroll=enroll)
    replace("edgeadapt.bundle", open_bundle=lambda _path: bundle)
    return calls


def test_arrays_of_one_class(invoke, asked, bundle, tmp_path: Path):
    file = tmp_path / "x.npz"
    np.savez(file, pixel_values=np.zeros((3, 3, 8, 8), np.float32))
    invoke("enroll", "b", "mine", "--class", "2", "--inputs", file, "--alpha", "3", "--quiet")
    options = {"alpha": 3.0, "beta": None}
    assert asked == [(bundle, "mine", {"pixel_values": (3, 3, 8, 8)}, ["2", "2", "2"], options)]


def test_a_label(invoke, asked, tmp_path: Path):
    file = tmp_path / "x.npz"
    np.savez(file, pixel_values=np.zeros((1, 3, 8, 8), np.float32))
    invoke("enroll", "b", "mine", "--class", "cat", "--inputs", file, "--quiet")
    assert asked[0][3] == ["cat"]


@pytest.mark.parametrize("flags", [(), ("--image", "a.png", "--inputs", "x.npz")])
def test_pictures_or_arrays(flags, invoke, asked):
    result = invoke("enroll", "b", "mine", "--class", "cat", *flags)
    assert result.exit_code == 1
    assert "examples are pictures or arrays" in result.stderr
    assert asked == []
