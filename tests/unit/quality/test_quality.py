from __future__ import annotations

import json

import numpy as np
import pytest

from edgeadapt.errors import ExportError, QuantizeError
from edgeadapt.fields import to_mapping
from edgeadapt.quality.gate import gate, table, verdict
from edgeadapt.quality.quality import QualityRow, measure_quality


def _row(**changes) -> QualityRow:
    values = {
        "adapter": None, "scheme": "int8", "positions": 1000, "mean_kl": 0.004, "max_kl": 0.1, "top1": 0.957,
        "max_relative_error": 0.02, "cosine": None, "accuracy": None, "reference_accuracy": None,
    }  # fmt: skip
    return QualityRow(**{**values, **changes})


def _references(session, cases, adapters=(None, "a", "b")):
    return {adapter: [session.answers(adapter, case) for case in cases] for adapter in adapters}


class Classifier:
    """Logits float32[1, 2] straight from the input; quantized ones are shifted."""

    def __init__(self, session) -> None:
        self.bundle = session.bundle
        self.shift = 0.0

    def use(self, adapter) -> None:
        self.adapter = adapter

    def run(self, inputs):
        return {"logits": inputs["x"] + np.array([[0, self.shift]], np.float32)}


def test_a_row_for_every_adapter(session, cases):
    session.faults = {"a": 0.5}
    rows = measure_quality(session, cases, _references(session, cases), "int8")
    assert [row.adapter for row in rows] == [None, "a", "b"]
    assert rows[0] == QualityRow(None, "int8", 9 + 7 + 3 + 5, 0.0, 0.0, 1.0, 0.0, None, None, None)
    # The same shift at every token changes the logits, but no distribution.
    assert rows[1].max_relative_error > 0.01
    assert rows[1].mean_kl == pytest.approx(0, abs=1e-6)
    assert all(json.loads(json.dumps(to_mapping(row))) == to_mapping(row) for row in rows)
    assert session.adapter is None


def test_a_quantized_cache_has_a_row_of_prefill_and_one_of_decode(session, cases):
    session.spec.cache_dtype = "int8"
    session.faults = {"chunks of 1": np.arange(7)}
    rows = measure_quality(session, cases, _references(session, cases), "int8")
    assert [(row.adapter, row.mode) for row in rows] == [
        (name, mode) for name in (None, "a", "b") for mode in ("prefill", "decode")
    ]
    assert [row.mean_kl for row in rows[::2]] == [0, 0, 0]
    assert min(row.mean_kl for row in rows[1::2]) > 0.1
    with pytest.raises(QuantizeError) as caught:
        gate(rows[:2], max_kl=0.1)
    assert caught.value.message.startswith("the quality gate fails: the base (decode) has a mean KL of ")
    assert caught.value.hint == (
        "use a key-value cache in float32, a scheme with more bits, exceptions (keep), --calibrate FILE for int4, or "
        "wider limits"
    )
    assert verdict([_row(mode="decode", mean_kl=0.2, top1=0.5, adapter="a")]) == (
        "int8 with a key-value cache in int8 changes the most likely answer of adapter 'a' at 50% of positions "
        "(mean KL 0.2): this model is ruined; leave out --kv-cache, and if that does not help, use fp16"
    )


def test_accuracy_where_labels_are_given(session):
    values = np.array([[[1, 0]], [[0, 1]], [[0.4, 0.5]], [[0.5, 0.4]]], np.float32)
    cases = [{"x": value} for value in values]
    classifier = Classifier(session)
    classifier.shift = 0.2
    references = {None: [{"logits": v} for v in values], "a": [{"logits": v} for v in values]}
    base, adapted = measure_quality(classifier, cases, references, "int4", labels=["no", "yes", "yes", "no"])
    assert (adapted.accuracy, adapted.reference_accuracy, adapted.top1) == (0.75, 1.0, 0.75)
    assert base.accuracy is None  # the base has no class of that name
    by_index, _ = measure_quality(classifier, cases, references, "int4", labels=[0, 1, 1, 0])
    assert by_index.accuracy == 0.75


def test_class_names_of_an_adapter_that_is_only_lent(session):
    values = np.array([[[1, 0]], [[0, 1]]], np.float32)
    cases, references = [{"x": value} for value in values], {"b": [{"logits": v} for v in values]}
    (row,) = measure_quality(
        Classifier(session), cases, references, "int8", labels=["up", "down"], class_names={"b": ("up", "down")}
    )
    assert (row.accuracy, row.reference_accuracy) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["no"], "1 labels for 2 samples\nHint: give one label per sample"),
        (
            ["no", "maybe"],
            (
                "the label 'maybe' is no class of adapter 'a', which has no, yes\n"
                "Hint: label the samples with class names as the adapter's config has them, or with class indices"
            ),
        ),
        (
            [0, 1],
            (
                "the samples have labels, but the model gives no class for a sample\n"
                "Hint: labels are for classification; leave them out for other tasks"
            ),
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(session, cases, labels, message):
    with pytest.raises(QuantizeError) as caught:
        measure_quality(session, cases, _references(session, cases, ("a",)), "int8", labels=labels)
    assert str(caught.value) == message


def test_nan_and_missing_outputs_are_errors(session, cases):
    session.faults = {"None": float("nan")}
    with pytest.raises(QuantizeError) as caught:
        measure_quality(session, cases, _references(session, cases, (None,)), "int4")
    assert str(caught.value) == (
        "the quantized model gives NaN or infinity\nHint: use a scheme with more bits, or --quantize none"
    )
    with pytest.raises(ExportError, match="is no output of the original"):
        measure_quality(session, cases, {None: [{"hidden": np.ones(1)}] * 2}, "int4")
    with pytest.raises(QuantizeError, match="there is nothing to compare with"):
        measure_quality(session, [], {}, "int4")


def test_the_gate_lets_good_rows_through():
    rows = [_row(), _row(adapter="a", mean_kl=0.01, top1=0.95)]
    gate(rows)
    gate(rows, max_kl=0.01, min_top1=0.95)


def test_the_gate_names_every_broken_limit_and_shows_the_table():
    rows = [_row(), _row(adapter="sales", mean_kl=0.2, top1=0.8, accuracy=0.5, reference_accuracy=0.75)]
    with pytest.raises(QuantizeError) as caught:
        gate(rows, max_kl=0.02, min_top1=0.9)
    assert str(caught.value) == (
        "the quality gate fails: adapter 'sales' has a mean KL of 0.2, more than 0.02; "
        "adapter 'sales' has a top-1 agreement of 0.8, less than 0.9\n"
        "adapter  scheme  positions  mean KL  max KL  top-1  cosine  accuracy  torch accuracy\n"
        "(base)   int8         1000  0.00400  0.1000  95.7%       -         -               -\n"
        "sales    int8         1000  0.20000  0.1000  80.0%       -     50.0%           75.0%\n"
        "Hint: use a scheme with more bits, exceptions (keep), --calibrate FILE for int4, or wider limits"
    )


def test_a_limit_without_a_figure_is_refused():
    row = _row(mean_kl=None, top1=None, max_kl=None, cosine=0.999)
    gate([row])
    with pytest.raises(QuantizeError, match="the base has no mean KL, because its outputs are no logits"):
        gate([row], max_kl=1.0)
    with pytest.raises(QuantizeError, match="the base has no top-1 agreement"):
        gate([row], min_top1=0.1)


def test_a_good_model_gets_no_verdict():
    assert verdict([_row(), _row(mean_kl=0.09, top1=0.86), _row(positions=12, top1=0.75, mean_kl=0.05)]) is None
    assert verdict([_row(mean_kl=None, top1=None, cosine=0.99)]) is None


def test_a_ruined_model_is_said_to_be_ruined():
    rows = [_row(scheme="int4", top1=0.7, mean_kl=0.3), _row(scheme="int4", adapter="a", top1=0.59, mean_kl=0.51)]
    assert verdict(rows) == (
        "int4 changes the most likely answer of adapter 'a' at 41% of positions (mean KL 0.51): "
        "this model is ruined at int4; use int8, or --calibrate FILE"
    )
    assert verdict(rows, calibrated=True).endswith("this model is ruined at int4; use int8")
    assert verdict([_row(top1=0.9, mean_kl=0.2)]) == (
        "int8 changes the most likely answer at 10% of positions (mean KL 0.2): this model is ruined at int8; use fp16"
    )
    assert verdict([_row(mean_kl=None, top1=None, cosine=0.9, scheme="int4")]) == (
        "int4 turns the output vectors to a mean cosine of 0.900: "
        "this model is ruined at int4; use int8, or --calibrate FILE"
    )


def test_a_table_has_a_line_for_every_row():
    assert len(table([_row(), _row(adapter="a")]).splitlines()) == 3
