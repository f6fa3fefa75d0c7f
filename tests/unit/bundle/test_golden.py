from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save

from edgeadapt.bundle.golden import check_golden, dump_golden, effect, make_golden, parse_golden, relative_error
from edgeadapt.errors import BundleError


def test_there_and_back(golden):
    data = dump_golden(golden)
    back = parse_golden(data, "f")
    assert (back.tolerance, back.minimum_effect) == (1e-3, 0.125)
    assert back.inputs["input_ids"].dtype == np.int64
    for name in ("inputs", "base", "adapted"):
        one, other = getattr(back, name), getattr(golden, name)
        assert one.keys() == other.keys()
        assert all((one[key] == other[key]).all() for key in one)
    assert {dump_golden(back) for _ in range(20)} == {data}


def test_a_golden_that_holds(golden):
    assert check_golden(golden, golden.base, golden.adapted) is None
    near = {"logits": golden.adapted["logits"] + np.float32(1.9e-3)}
    assert check_golden(golden, golden.base, near) is None
    assert check_golden(golden, golden.base | {"more": np.zeros(1)}, golden.adapted | {"more": np.zeros(1)}) is None


@pytest.mark.parametrize(
    ("base", "adapted", "message"),
    [
        (
            [[1, -2]],
            [[1.503, -2]],
            "with the adapter output 'logits' is off by 0.0015 of its largest value, allowed are 0.001",
        ),
        (
            [[1.1, -2]],
            [[1.5, -2]],
            "without the adapter output 'logits' is off by 0.05 of its largest value, allowed are 0.001",
        ),
        ([[1, -2]], [[np.nan, -2]], "with the adapter output 'logits' holds NaN or infinite values"),
        ([[1, -2]], [[1.5, -2, 0]], "with the adapter output 'logits' has the shape [1, 3], not [1, 2]"),
    ],
)
def test_a_golden_that_does_not_hold(golden, base, adapted, message):
    measured = [{"logits": np.array(value, np.float32)} for value in (base, adapted)]
    assert check_golden(golden, *measured) == message


def test_an_output_that_is_missing(golden):
    assert check_golden(golden, {}, golden.adapted) == "without the adapter there is no output 'logits'"


def test_an_adapter_that_is_loaded_but_not_used(golden):
    """Also with a tolerance so large that the base's outputs pass for adapted ones."""
    loose = dataclasses.replace(golden, tolerance=0.5)
    assert check_golden(loose, golden.base, golden.base) == (
        "the adapter has hardly any effect: outputs differ from the base's by 0 of the largest value, "
        "at least 0.125 are needed"
    )


def test_an_adapter_that_does_nothing_gets_no_golden(golden):
    with pytest.raises(BundleError) as caught:
        make_golden("zero", golden.inputs, golden.base, golden.base, tolerance=1e-3, smallest_effect=1e-6)
    assert str(caught.value) == (
        "adapter 'zero' does nothing: its outputs differ from the base's by 0 of the largest value, at least 1e-06 "
        "is needed\nHint: check that the adapter was trained and saved (an untrained LoRA has a zero B)"
    )
    broken = {"logits": np.full((1, 2), np.inf, np.float32)}
    with pytest.raises(BundleError, match="adapter 'inf': the golden outputs hold NaN or infinite values"):
        make_golden("inf", golden.inputs, golden.base, broken, tolerance=1e-3, smallest_effect=1e-6)


def test_effects_and_errors():
    zero, one = np.zeros(2), np.ones(2)
    assert relative_error(zero, one) == 1
    assert relative_error(4 * one, one) == 0.75
    assert relative_error(np.zeros(0), np.zeros(0)) == 0
    assert effect({"a": one, "b": one}, {"a": one, "b": 1.5 * one}) == 0.5
    assert effect({"a": one}, {"a": np.ones(3)}) == 1
    with pytest.raises(ValueError, match="cannot be compared"):
        effect({"a": one}, {"b": one})


HEADER = '{"schema": "edgeadapt.golden/1", "tolerance": 0.1, "minimum_effect": 0.1}'
GOOD = {"inputs:x": np.ones(1), "base:y": np.ones(1), "adapted:y": np.ones(1)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (GOOD, None, "f: not a golden: it has no golden header"),
        (GOOD, {"golden": "{}"}, "f: field schema is missing"),
        (
            GOOD,
            {"golden": HEADER.replace("/1", "/2")},
            "f: not a valid golden: schema is 'edgeadapt.golden/2', must be 'edgeadapt.golden/1'",
        ),
        (
            GOOD,
            {"golden": HEADER.replace("0.1", "0")},
            "f: not a valid golden: tolerance 0.0 and minimum_effect 0.0 must be above 0",
        ),
        (GOOD | {"z": np.ones(1)}, {"golden": HEADER}, "f: unknown tensor 'z'"),
        (GOOD | {"base:z": np.ones(1)}, {"golden": HEADER}, "f: not a valid golden: inputs or outputs are missing"),
        (
            GOOD | {"base:y": np.full(1, np.nan)},
            {"golden": HEADER},
            "f: not a valid golden: it holds NaN or infinite values",
        ),
    ],
)
def test_refusals(tensors, metadata, message):
    with pytest.raises(BundleError) as caught:
        parse_golden(save(tensors, metadata), "f")
    assert caught.value.message == message


def test_damaged_goldens(golden):
    data = dump_golden(golden)
    for length in range(len(data)):
        with pytest.raises(BundleError):
            parse_golden(data[:length], "f")
    for position in range(8, len(data)):
        changed = bytearray(data)
        changed[position] ^= 4
        try:
            parse_golden(bytes(changed), "f")
        except BundleError as error:
            assert "f: " in error.message  # noqa: PT017
