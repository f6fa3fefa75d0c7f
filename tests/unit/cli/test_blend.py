"""blend: what it asks of the library and what it shows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

from edgeadapt.bundle.combine import METHODS
from edgeadapt.bundle.manifest import AdapterRecord, Blend, BlendPart
from edgeadapt.cli import blend as command


@pytest.fixture
def asked(replace, bundle):
    calls = []
    parts = (BlendPart("a", 0.7, "00" * 32), BlendPart("b", 0.3, "11" * 32))
    made = Blend(parts, "ties", 0.2, 4, None, error=0.625, rank_error=0.125)
    record = AdapterRecord("lora", 4, 32, 0.5, 1e-3, "stamp", blend=made)
    bundle.manifest = dataclasses.replace(bundle.manifest, adapters={"x": record})

    def blend_adapters(path, weights, **options):
        calls.append((path, weights, {key: value for key, value in options.items() if key != "progress"}))
        return bundle

    replace("edgeadapt.blending", blend_adapters=blend_adapters)
    return calls


def test_every_method_is_offered():
    assert get_args(command._Method) == METHODS


def test_what_is_asked_and_json(invoke, asked):
    flags = ("--method", "ties", "--density", "0.2", "--rank", "4", "--force", "--json")
    result = invoke("blend", "b", "a=0.7", "b=0.3", "--as", "x", *flags)
    options = {"name": "x", "method": "ties", "density": 0.2, "rank": 4, "seed": None, "force": True}
    assert asked == [(Path("b"), {"a": 0.7, "b": 0.3}, options)]
    assert json.loads(result.stdout)["adapters"]["x"]["blend"] == {
        "parts": [
            {"adapter": "a", "weight": 0.7, "sha256": "00" * 32},
            {"adapter": "b", "weight": 0.3, "sha256": "11" * 32},
        ],
        "method": "ties",
        "density": 0.2,
        "rank": 4,
        "seed": None,
        "error": 0.625,
        "rank_error": 0.125,
    }


def test_defaults_and_what_people_see(invoke, asked):
    shown = invoke("blend", "b", "a=-1", "--as", "x")
    options = {"name": "x", "method": "cat", "density": None, "rank": None, "seed": None, "force": False}
    assert asked == [(Path("b"), {"a": -1.0}, options)]
    assert shown.stdout == ""
    assert "ties of a 0.7, b 0.3; error 0.62" in " ".join(shown.stderr.split())
    assert shown.stderr.endswith(
        "x: ties, error 0.625 against the exact weighted sum of products; cutting ranks lost 0.125 of the method's own "
        "result\n"
    )
    assert invoke("blend", "b", "a=1", "--as", "x", "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (["a"], "'a' is not of the form NAME=WEIGHT"),
        (["a=1", "a=2"], "'a' occurs twice"),
        (["a=nan"], "'nan', the weight of 'a', is not finite"),
        (["a=much"], "'much', the weight of 'a', is not a number"),
    ],
)
def test_wrong_weights(invoke, asked, weights, problem):
    result = invoke("blend", "b", *weights, "--as", "x")
    assert (result.exit_code, asked) == (2, [])
    assert problem in result.stderr
