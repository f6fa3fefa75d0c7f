from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.errors import ExportError
from edgeadapt.quality.compare import compare, kl_divergence, output_mask

LOGITS = np.array([[[1.0, 2.0, 0.0], [4.0, 0.0, -4.0]]], np.float32)


def test_equal_outputs_differ_in_nothing():
    found = compare({"logits": LOGITS, "unused": LOGITS}, {"logits": LOGITS})
    assert found.absolute_errors == {"logits": 0.0}
    assert found.worst == ("logits", 0.0)
    assert found.kl.tolist() == [0.0, 0.0]
    assert found.agrees.tolist() == [True, True]
    assert found.cosines is None


def test_figures_by_hand():
    measured = LOGITS + np.array([[[0, 0, 0], [0, 6, 0]]], np.float32)
    found = compare({"logits": LOGITS}, {"logits": measured})
    assert found.absolute_errors == {"logits": 6.0}
    assert found.relative_errors == {"logits": 1.5}
    assert found.agrees.tolist() == [True, False]
    p, q = (np.exp(x[0, 1]) / np.exp(x[0, 1]).sum() for x in (LOGITS.astype(float), measured.astype(float)))
    assert found.kl == pytest.approx([0, (p * np.log(p / q)).sum()])


def test_masked_positions_count_nowhere():
    measured = LOGITS.copy()
    measured[0, 1] = np.nan
    found = compare({"logits": LOGITS}, {"logits": measured}, np.array([[1, 0]]))
    assert found.worst == ("logits", 0.0)
    assert found.kl.shape == found.agrees.shape == (1,)
    whole = compare({"logits": LOGITS}, {"logits": measured})
    assert whole.worst == ("logits", float("inf"))
    assert whole.agrees.tolist() == [True, False]
    assert np.isnan(whole.kl[1])


def test_a_mask_is_only_for_outputs_of_its_shape():
    pooled = np.ones((2, 4), np.float32)
    assert compare({"pooler_output": pooled}, {"pooler_output": pooled * 2}, np.zeros((2, 4))).worst[1] == 1.0


def test_kl_does_not_care_for_a_shift_and_allows_ruled_out_classes():
    logits = np.array([[1.0, 2.0, -np.inf]])
    assert kl_divergence(logits, logits + 3) == pytest.approx([0])
    assert kl_divergence(logits, np.array([[1.0, 2.0, 0.0]]))[0] > 0.05


def test_vectors_are_compared_by_angle():
    reference = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], np.float32)
    measured = np.array([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
    found = compare({"embeddings": reference}, {"embeddings": measured})
    assert found.cosines == pytest.approx([1, np.sqrt(0.5), 1])
    assert found.kl is None
    assert found.agrees is None


def test_one_class_is_no_distribution():
    found = compare({"logits": np.ones((2, 1))}, {"logits": np.full((2, 1), 1.5)})
    assert found.kl is None
    assert found.worst == ("logits", 0.5)


def test_equal_infinities_are_equal():
    both = {"mask": np.array([[-np.inf, 1.0]])}
    assert compare(both, both).worst == ("mask", 0.0)


def test_a_decoders_outputs_have_no_encoder_mask():
    mask = np.ones((1, 2))
    assert output_mask({"attention_mask": mask}) is mask
    assert output_mask({"attention_mask": mask, "decoder_input_ids": mask}) is None
    assert output_mask({"pixel_values": mask}) is None


@pytest.mark.parametrize(
    ("reference", "measured", "message"),
    [
        ({"logits": LOGITS}, {}, "the graph has no output to compare\nHint: this is a bug; please report it"),
        (
            {"logits": LOGITS, "hidden": LOGITS},
            {"scores": LOGITS},
            (
                "output 'scores' of the graph is no output of the original, which has hidden, logits\n"
                "Hint: give the graph's outputs the original's names"
            ),
        ),
        (
            {"logits": LOGITS},
            {"logits": LOGITS[:, :1]},
            (
                "output 'logits' has the shape [1, 1, 3], the original's has [1, 2, 3]\n"
                "Hint: an axis was fixed when the graph was traced; export with other example inputs"
            ),
        ),
    ],
)
def test_what_cannot_be_compared_is_said(reference, measured, message):
    with pytest.raises(ExportError) as caught:
        compare(reference, measured)
    assert str(caught.value) == message


def test_a_scalar_and_whole_numbers_are_compared_too():
    found = compare(
        {"loss": np.array(2.0), "ids": np.array([4, -10])}, {"loss": np.array(1.5), "ids": np.array([4, -8])}
    )
    assert found.absolute_errors == {"loss": 0.5, "ids": 2}
    assert found.relative_errors == {"loss": 0.25, "ids": 0.2}


def test_a_mask_of_ones_leaves_nothing_out():
    reference, measured = (np.random.default_rng(seed).standard_normal((2, 3, 5)) for seed in (0, 1))
    masked, plain = (
        compare({"logits": reference}, {"logits": measured}, mask) for mask in (np.ones((2, 3), np.int64), None)
    )
    assert masked.kl.tolist() == plain.kl.tolist()
    assert masked.relative_errors == plain.relative_errors
