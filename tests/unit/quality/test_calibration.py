from __future__ import annotations

import json

import numpy as np
import pytest

from edgeadapt.errors import FileError, RecipeError
from edgeadapt.quality.calibration import (
    Calibration,
    built_in,
    check_adapters,
    fitted_samples,
    read_calibration,
    samples_of,
    split,
)

FORMS = (
    'each line is {"text": ...}, {"text": ..., "label": ...}, {"prompt": ..., "completion": ...} '
    'or {"messages": [{"role": ..., "content": ...}, ...]}; "adapter": NAME says whose sample it is'
)


def _write(path, *entries):
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries), encoding="utf-8")
    return path


def test_the_built_in_texts_are_varied():
    samples = built_in()
    assert samples.count == 12
    assert all(200 < len(text) < 700 for text in samples.texts)
    assert len(set(samples.texts)) == 12
    assert json.loads(samples.texts[3])["order"]["id"] == 48213
    assert "    total = 0.0\n" in samples.texts[2]


def test_a_text_a_line(tmp_path):
    assert read_calibration(_write(tmp_path / "a b.txt", "one", "", "  zwei ü ")) == Calibration(("one", "zwei ü"))


def test_json_lines(tmp_path):
    path = _write(tmp_path / "s.jsonl", {"text": "a"}, "", {"prompt": "p ", "completion": "c"})
    assert read_calibration(path) == Calibration(("a", "p c"))
    path = _write(tmp_path / "s.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": 0})
    assert read_calibration(path) == Calibration(("a", "b"), (1, 0))


def test_chat_messages_are_rendered_by_the_model_if_it_can(tmp_path):
    path = _write(
        tmp_path / "s.jsonl", {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Yo"}]}
    )
    assert read_calibration(path).texts == ("user: Hi\nbot: Yo",)
    assert read_calibration(path, render=lambda m: f"<{m[0]['content']}>").texts == ("<Hi>",)


def test_arrays(tmp_path):
    np.savez(tmp_path / "s.npz", pixel_values=np.ones((3, 2), np.float32), labels=np.array([0, 2, 1]))
    samples = read_calibration(tmp_path / "s.npz")
    assert samples.count == 3
    assert samples.labels == (0, 2, 1)
    assert samples.arrays["pixel_values"].shape == (3, 2)
    np.savez(tmp_path / "s.npz", x=np.ones((2, 1)), labels=np.array(["no", "yes"]))
    assert read_calibration(tmp_path / "s.npz").labels == ("no", "yes")


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "s.csv",
            ["a,b"],
            (
                "s.csv: samples in a .csv file cannot be read\nHint: give a .txt file (one text a line), a .jsonl file "
                "(one object a line) or an .npz file (arrays)"
            ),
        ),
        ("s.txt", ["", " "], "s.txt holds no text\nHint: write one text a line"),
        ("s.jsonl", [""], f"s.jsonl holds no sample\nHint: {FORMS}"),
        (
            "s.jsonl",
            [{"text": "a"}, "{oops"],
            (
                "s.jsonl line 2 is not JSON: Expecting property name enclosed in double quotes: "
                "line 1 column 2 (char 1)\n"
                f"Hint: {FORMS}"
            ),
        ),
        ("s.jsonl", [{"text": "a", "id": 3}], f"s.jsonl line 1 is an object with id, text\nHint: {FORMS}"),
        ("s.jsonl", ["[1]"], f"s.jsonl line 1 is [1]\nHint: {FORMS}"),
        ("s.jsonl", [{"text": " "}], "s.jsonl line 1: text is ' '\nHint: give a text that is not empty"),
        (
            "s.jsonl",
            [{"text": "a", "label": True}],
            "s.jsonl line 1: label is True\nHint: give a class index or a class name",
        ),
        (
            "s.jsonl",
            [{"text": "a", "label": 1}, {"text": "b"}],
            "s.jsonl: 1 of 2 samples have a label\nHint: label all of them, or none",
        ),
        (
            "s.jsonl",
            [{"messages": [{"role": "user"}]}],
            f"s.jsonl line 1: messages is not a list of chat messages\nHint: {FORMS}",
        ),
    ],
)
def test_damaged_texts_are_refused(tmp_path, name, lines, message):
    with pytest.raises(RecipeError) as caught:
        read_calibration(_write(tmp_path / name, *lines))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "s.npz holds no array\nHint: store each input under its name, samples on axis 0"),
        (
            {"a": np.ones((2, 1)), "b": np.ones((3, 1))},
            (
                "s.npz: b has the shape [3, 1], expected samples on axis 0, 2 as in a\n"
                "Hint: stack the samples of every input on axis 0"
            ),
        ),
        ({"a": np.array([1.0, np.nan])}, "s.npz: a holds NaN or infinity\nHint: give finite numbers"),
        (
            {"a": np.ones((2, 1)), "labels": np.ones(3)},
            (
                "s.npz: labels is float64[3], expected 2 class indices or names\n"
                "Hint: store one whole number or name per sample under the name labels"
            ),
        ),
    ],
)
def test_damaged_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(RecipeError) as caught:
        read_calibration(tmp_path / "s.npz")
    assert str(caught.value) == message


def test_pickles_are_not_opened(tmp_path):
    np.savez(tmp_path / "s.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(RecipeError, match=r"s\.npz is no \.npz file of plain arrays: Object arrays cannot be loaded"):
        read_calibration(tmp_path / "s.npz")
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(RecipeError, match=r"t\.npz is no \.npz file of plain arrays"):
        read_calibration(tmp_path / "t.npz")


def test_other_encodings_and_missing_files_are_told(tmp_path):
    (tmp_path / "s.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"s\.txt is not UTF-8 text"):
        read_calibration(tmp_path / "s.txt")
    with pytest.raises(FileError):
        read_calibration(tmp_path / "missing.npz")


def test_every_fourth_sample_is_held_out():
    samples = Calibration(tuple("abcdefgh"), tuple(range(8)))
    fit, measure = split(samples)
    assert measure == Calibration(("d", "h"), (3, 7))
    assert fit.texts == tuple("abcefg")
    few = Calibration(("a", "b"))
    assert split(few) == (few, few)
    arrays = Calibration((), None, {"x": np.arange(8)})
    assert split(arrays)[1].arrays["x"].tolist() == [3, 7]


def test_samples_may_say_whose_they_are(tmp_path):
    lines = [{"text": f"{name}{i}", **({"adapter": name} if name else {})} for i in range(4) for name in ("a", "b", "")]
    samples = read_calibration(_write(tmp_path / "s.jsonl", *map(json.dumps, lines)))
    calibrate, measure = split(samples)

    assert measure == Calibration(("a3", "b3", "3"), adapters=("a", "b", None))
    assert samples_of(measure, "a") == Calibration(("a3", "3"), adapters=("a", None))
    assert samples_of(measure, None) == Calibration(("3",), adapters=(None,))
    assert calibrate.count == 9
    own = Calibration(("x", "y"), adapters=("a", "b"))
    assert samples_of(own, None) == own
    assert samples_of(own, "a") == Calibration(("x",), adapters=("a",))
    check_adapters(samples, ["a", "b", "c"])


def test_weights_are_fitted_to_an_adapter_on_its_own_samples_and_else_on_those_for_all():
    samples = Calibration(("1", "a1", "2", "a2"), adapters=(None, "a", None, "a"))
    for_all = Calibration(("1", "2"), adapters=(None, None))
    assert fitted_samples(samples, "a") == Calibration(("a1", "a2"), adapters=("a", "a"))
    assert fitted_samples(samples, "b") == for_all
    assert fitted_samples(samples, None) == for_all
    assert fitted_samples(Calibration(("1",)), "a") == Calibration(("1",))


def test_an_adapter_with_few_samples_keeps_them_for_both_uses():
    samples = Calibration(tuple("abcdefghi"), adapters=("x",) * 8 + ("y",))
    assert split(samples) == (samples, samples)


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        (
            ("a", "z"),
            (
                "samples are for the adapter 'z', which is not exported\n"
                "Hint: known: a, b; leave it out for samples that are for all"
            ),
        ),
        (
            ("a", "a"),
            (
                "there is no sample for the adapter 'b'\n"
                'Hint: add lines with "adapter": "b", or lines without "adapter", which are for all'
            ),
        ),
    ],
)
def test_samples_are_for_the_adapters_that_are_exported(owners, message):
    with pytest.raises(RecipeError) as caught:
        check_adapters(Calibration(("x", "y"), adapters=owners), ["a", "b"])
    assert str(caught.value) == message


def test_an_adapter_is_a_name(tmp_path):
    with pytest.raises(RecipeError) as caught:
        read_calibration(_write(tmp_path / "s.jsonl", '{"text": "a", "adapter": 3}'))
    assert str(caught.value) == "s.jsonl line 1: adapter is 3\nHint: give the adapter's name in the bundle"
