from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_bundles

from edgeadapt.errors import SessionError
from edgeadapt.runtime import answer, open_session
from edgeadapt.runtime.tasks import class_labels, pool

TEXTS = ["short", "a text with many more than twelve tokens", "été"]
TAKES = "this model takes input_ids int64[batch, seq]; attention_mask int64[batch, seq]"


@pytest.fixture
def session(classifier):
    with open_session(classifier[0], threads=1) as opened:
        yield opened


def _softmax(logits):
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_run_equals_the_reference(classifier, session, adapter, dtype):
    _, weights, adapters = classifier
    ids = np.random.default_rng(0).integers(0, 256, (2, 5))
    mask = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    session.use(adapter)
    found = session.run({"input_ids": ids.astype(dtype), "attention_mask": mask.astype(dtype)})
    assert set(found) == {"logits", "last_hidden_state"}
    assert found["last_hidden_state"].shape == (2, 5, 16)
    expected = tiny_bundles.classifier_reference(weights, ids, mask, adapters.get(adapter, {}))
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=1e-5)


def test_lists_of_different_shape_in_turn(session):
    """An output that the run before allocated with another shape must not get in the way."""
    for width in (3, 5, 1):
        found = session.run({"input_ids": [[1] * width], "attention_mask": [[1] * width]})
        assert found["last_hidden_state"].shape == (1, width, 16)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": [[1]]}, f"input 'attention_mask' is missing\nHint: {TAKES}"),
        (
            {"input_ids": [[1]], "attention_mask": [[1]], "dense.lora_A": [[1.0]]},
            f"unknown input 'dense.lora_A'\nHint: {TAKES}",
        ),
        (
            {"input_ids": [1], "attention_mask": [[1]]},
            f"input 'input_ids' is int64[1], expected int64[batch, seq]\nHint: {TAKES}",
        ),
        (
            {"input_ids": [[1.0]], "attention_mask": [[1]]},
            f"input 'input_ids' is float64[1, 1], expected int64[batch, seq]\nHint: {TAKES}",
        ),
        (
            {"input_ids": np.zeros((1, 0), np.int64), "attention_mask": [[1]]},
            f"input 'input_ids' is int64[1, 0], expected int64[batch, seq]\nHint: {TAKES}",
        ),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            f"axis 'seq' is 1 in input 'attention_mask' and 2 in input 'input_ids'; they must agree\nHint: {TAKES}",
        ),
    ],
)
def test_wrong_inputs_are_refused(session, inputs, message):
    with pytest.raises(SessionError) as caught:
        session.run(inputs)
    assert str(caught.value) == message


def test_uneven_lists_are_refused(session):
    with pytest.raises(SessionError, match="input 'input_ids' is not an array: "):
        session.run({"input_ids": [[1], [1, 2]], "attention_mask": [[1], [1]]})


def test_what_the_graph_refuses_becomes_an_error_with_a_hint(session, capfd):
    with pytest.raises(SessionError) as caught:
        session.run({"input_ids": [[5000]], "attention_mask": [[1]]})
    capfd.readouterr()  # ONNX Runtime also prints it
    assert caught.value.message.startswith("model.plain.onnx failed to run: ")
    assert "indices element out of data bounds" in caught.value.message
    assert caught.value.hint == "check names, shapes and the bundle's files with `edgeadapt verify`"


def test_a_classifier_does_not_write(session):
    for call in (lambda: session.generate("x"), lambda: session.new_cache(1, 4)):
        with pytest.raises(SessionError) as caught:
            call()
        assert str(caught.value) == (
            "this bundle's task is 'text-classification'; it does not write text\nHint: use session.run(inputs)"
        )
    with pytest.raises(SessionError) as caught:
        session.run({"input_ids": [[1]], "attention_mask": [[1]]}, chunk_size=2)
    assert str(caught.value) == "chunk_size is for decoder-only models\nHint: leave it out"


@pytest.mark.parametrize(("adapter", "labels"), [(None, ("no", "maybe", "yes")), ("a", ("red", "green", "blue"))])
def test_texts_are_classified_with_the_right_labels(classifier, session, adapter, labels):
    """Batch, padding and truncation change nothing: each answer is that of its own text, cut to twelve tokens."""
    _, weights, adapters = classifier
    session.use(adapter)
    answers = answer(session, texts=TEXTS)
    for text, found in zip(TEXTS, answers, strict=True):
        ids = np.asarray([session.text.encode(text)[:12]])
        logits = tiny_bundles.classifier_reference(weights, ids, np.ones_like(ids), adapters.get(adapter, {}))[0]
        scores = _softmax(logits)
        assert found["label"] == labels[scores.argmax()]
        assert list(found["scores"]) == list(labels)
        np.testing.assert_allclose(list(found["scores"].values()), scores, atol=1e-5)
        assert found["score"] == max(found["scores"].values())
    assert [found["truncated"] for found in answers] == [False, True, False]
    json.dumps(answers)


def test_a_blend_has_names_only_if_its_adapters_agree(session):
    session.use({"a": 0.5})
    assert class_labels(session, 3) == ("red", "green", "blue")
    assert class_labels(session, 4) == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")


def test_tokens_are_tagged_with_their_place_in_the_text(tmp_path):
    """The tiny graph gives logits per text, so its hidden state stands in for logits per token."""
    import onnx

    path = tmp_path / "tags.bundle"
    weights = tiny_bundles.write_classifier(path, {}, task="token-classification")
    for kind in ("plain", "slots"):
        file = path / "graph" / f"model.{kind}.onnx"
        model = onnx.load(str(file), load_external_data=False)
        names = {"logits": "text_logits", "last_hidden_state": "logits"}
        for node in model.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        for output in model.graph.output:
            output.name = names[output.name]
        onnx.save(model, str(file))
    _rewrite_manifest(path)
    with open_session(path, threads=1) as session:
        found = answer(session, texts=["ab", "été"])
        one = answer(session, texts=["été"])
    hidden = np.tanh(weights["embed.weight"][[*map(_byte, "ab")]] @ weights["dense.weight"].T)
    scores = _softmax(hidden.astype(np.float64))
    assert [token["label"] for token in found[0]["tokens"]] == [f"LABEL_{row.argmax()}" for row in scores]
    np.testing.assert_allclose([token["score"] for token in found[0]["tokens"]], scores.max(1), atol=1e-5)
    assert [(t["text"], t["start"], t["end"]) for t in found[0]["tokens"]] == [("a", 0, 1), ("b", 1, 2)]
    assert [t["text"] for t in found[1]["tokens"]] == ["é", "é", "t", "é", "é"]
    assert [t["label"] for t in found[1]["tokens"]] == [t["label"] for t in one[0]["tokens"]]


def _byte(letter):
    return tiny_bundles.byte_tokenizer().token_to_id(letter)


def _rewrite_manifest(path, **changes):
    import dataclasses

    from edgeadapt.bundle import write_manifest
    from edgeadapt.bundle.rules import parse_manifest

    file = path / "manifest.json"
    manifest = parse_manifest(file.read_bytes(), str(file))
    file.unlink()
    write_manifest(path, dataclasses.replace(manifest, **changes))


def test_texts_become_vectors(tmp_path):
    path = tmp_path / "vectors.bundle"
    weights = tiny_bundles.write_classifier(path, {}, task="feature-extraction")
    (path / "assets" / "pooling.json").write_text('{"pooling_mode_mean_tokens": true, "normalize": true}')
    _rewrite_manifest(path)
    with open_session(path, threads=1) as session:
        found = answer(session, texts=["ab", "abcabc"])
    hidden = np.tanh(weights["embed.weight"][[*map(_byte, "ab")]] @ weights["dense.weight"].T)
    expected = hidden.mean(0) / np.linalg.norm(hidden.mean(0))
    np.testing.assert_allclose(found[0]["embedding"], expected, atol=1e-5)
    assert len(found[1]["embedding"]) == 16


def test_pooling_follows_its_file():
    hidden = np.asarray([[[1.0, 4.0], [3.0, 0.0], [9.0, 9.0]]], np.float32)
    mask = np.asarray([[1, 1, 0]])
    outputs = {"last_hidden_state": hidden}
    for config, expected in (
        ({}, [2, 2]),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, [2, 2]),
        ({"pooling_mode_cls_token": True}, [1, 4]),
        ({"pooling_mode_max_tokens": True}, [3, 4]),
        ({"normalize": True}, [2**-0.5, 2**-0.5]),
    ):
        np.testing.assert_allclose(pool(outputs, mask, config), [expected], atol=1e-6)
    for config in ({"pooling_mode_lasttoken": True}, {"pooling_mode_lasttoken": True, "pooling_mode_cls_token": True}):
        with pytest.raises(SessionError) as caught:
            pool(outputs, mask, config)
        assert str(caught.value) == (
            f"pooling.json asks for {', '.join(config)}, which is not supported\n"
            "Hint: pool session.run's outputs yourself"
        )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing"),
        ({"images": ["x.png"]}, "images"),
        ({"texts": ["x"], "labels": ["y"]}, "texts and labels"),
    ],
)
def test_a_task_takes_what_it_takes(session, given, said):
    with pytest.raises(SessionError) as caught:
        answer(session, **given)
    assert str(caught.value) == f"task 'text-classification' takes texts; given: {said}\nHint: give texts"


def test_a_task_without_words_says_so(decoder):
    with open_session(decoder[0], threads=1) as session, pytest.raises(SessionError) as caught:
        answer(session, texts=["x"])
    assert str(caught.value) == (
        "this bundle's task is 'text-generation', for which there are no answers in words\n"
        "Hint: use session.generate for models that write, or session.run for arrays"
    )


def test_a_bundle_without_tokenizer_says_so(tmp_path):
    path = tmp_path / "bare.bundle"
    tiny_bundles.write_classifier(path, {})
    (path / "assets" / "tokenizer.json").unlink()
    _rewrite_manifest(path)
    with open_session(path, threads=1) as session, pytest.raises(SessionError) as caught:
        answer(session, texts=["x"])
    assert str(caught.value) == (
        "bundle 'bare.bundle' holds no assets/tokenizer.json\n"
        "Hint: give token ids or arrays instead of text, or export the bundle again with its tokenizer"
    )


def test_a_broken_tokenizer_says_so(tmp_path):
    path = tmp_path / "bare.bundle"
    tiny_bundles.write_classifier(path, {})
    (path / "assets" / "tokenizer.json").write_text("{}")
    _rewrite_manifest(path)
    with open_session(path, threads=1) as session, pytest.raises(SessionError, match="could not be read") as caught:
        answer(session, texts=["x"])
    assert caught.value.hint == "check the bundle with `edgeadapt verify`"


def _pictures():
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (8, 8, 3)).astype(np.uint8) for _ in range(2)]


def test_pictures_are_classified(tmp_path):
    weights = tiny_bundles.write_pictures(tmp_path / "pictures.bundle", zero_shot=False)
    with open_session(tmp_path / "pictures.bundle", threads=1) as session:
        found = answer(session, images=_pictures())
    for picture, one in zip(_pictures(), found, strict=True):
        scores = _softmax(weights["head.weight"] @ (picture.mean((0, 1)) / 255))
        assert list(one["scores"]) == ["cat", "dog", "cow"]
        np.testing.assert_allclose(list(one["scores"].values()), scores, atol=1e-5)


def test_pictures_are_compared_with_words(tmp_path):
    weights = tiny_bundles.write_pictures(tmp_path / "pictures.bundle", zero_shot=True)
    labels = ["owl", "elephant", "ant"]
    with open_session(tmp_path / "pictures.bundle", threads=1) as session:
        found = answer(session, images=_pictures(), labels=labels)
        tokens = [session.text.encode(f"a photo of {label}") for label in labels]
        other = answer(session, images=_pictures(), labels=labels, hypothesis="{}")
    text = np.stack([weights["embed.weight"][ids].sum(0) for ids in tokens])
    for picture, one in zip(_pictures(), found, strict=True):
        scores = _softmax(text @ (weights["head.weight"] @ (picture.mean((0, 1)) / 255)))
        assert list(one["scores"]) == labels
        np.testing.assert_allclose(list(one["scores"].values()), scores, atol=1e-4)
        assert one["label"] == labels[scores.argmax()]
    assert other != found


def test_zero_shot_needs_labels(tmp_path):
    tiny_bundles.write_pictures(tmp_path / "pictures.bundle", zero_shot=True)
    with open_session(tmp_path / "pictures.bundle", threads=1) as session, pytest.raises(SessionError) as caught:
        answer(session, images=_pictures())
    assert str(caught.value) == (
        "task 'zero-shot-image-classification' takes images and labels; given: images\nHint: give images and labels"
    )
