"""Texts and pictures to a model's inputs, its outputs to answers in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import SessionError
from edgeadapt.runtime.images import Picture, pixel_values
from edgeadapt.runtime.tokenizer import EncodedText, read_json_asset

if TYPE_CHECKING:
    from edgeadapt.runtime.session import Session

Array = NDArray[Any]
Text = str | tuple[str, str]
"""A text, or a pair of texts for models that compare two."""

HYPOTHESIS = "a photo of {}"


def _check_head(session: Session) -> None:
    """Refuse answers of a head that nobody has trained: the base has none, the adapters bring it."""
    missing = session.bundle.manifest.extra.get("untrained", ())
    if missing and session.adapter is None:
        raise SessionError(
            f"the base of this bundle has no trained head ({missing[0]}), so it has no answers of its own",
            hint=f"choose an adapter: {', '.join(session.adapters)}",
        )


def answer(
    session: Session,
    *,
    texts: Sequence[Text] = (),
    images: Sequence[Picture] = (),
    labels: Sequence[str] = (),
    hypothesis: str = HYPOTHESIS,
) -> list[dict[str, Any]]:
    """Return one answer per text or picture, as a mapping that JSON can hold.

    What an answer holds depends on the bundle's task:

    - text-classification, image-classification: `label`, `score`, `scores` by label (softmax, or sigmoid where several
      labels can hold at once), or `value` for a model with a single output;
    - token-classification: `tokens`, each with `text`, `label`, `score`, `start`, `end`;
    - feature-extraction, sentence-similarity: `embedding`, pooled as the bundle's pooling.json says, else the mean; of
      a model of two towers for texts or for pictures, which are compared by their products;
    - zero-shot-image-classification: as image-classification, over `labels`.

    Answers to texts also say whether the text was `truncated` to the model's longest input.

    Args:
        session: of a single-pass bundle.
        texts: for a task that reads text.
        images: for a task that reads pictures.
        labels: what zero-shot classification chooses from.
        hypothesis: the sentence around each of `labels`.

    Raises:
        SessionError: if the task needs something else than what is given.
    """
    task = session.bundle.manifest.task
    zero_shot = task == "zero-shot-image-classification"
    of_images = _OF_IMAGES.get(task) or (
        _embed_images if images and "image" in session.bundle.manifest.graphs else None
    )
    needs = "images and labels" if zero_shot else "images" if of_images else "texts"
    if not zero_shot and task not in _OF_IMAGES and task not in _OF_TEXTS:
        raise SessionError(
            f"this bundle's task is {task!r}, for which there are no answers in words",
            hint="use session.generate for models that write, or session.run for arrays",
        )
    given = " and ".join(name for name, x in (("texts", texts), ("images", images), ("labels", labels)) if len(x))
    if given != needs:
        raise SessionError(f"task {task!r} takes {needs}; given: {given or 'nothing'}", hint=f"give {needs}")
    _check_head(session)
    if zero_shot:
        return _zero_shot(session, images, [hypothesis.format(label) for label in labels], labels)
    return of_images(session, images) if of_images else _OF_TEXTS[task](session, texts)


def text_inputs(session: Session, texts: Sequence[Text]) -> tuple[dict[str, Array], EncodedText]:
    """Return the arrays that the model takes for a batch of texts, and how they were encoded.

    Raises:
        SessionError: if the model does not read text, or the bundle holds no tokenizer.
    """
    wanted = session.inputs()
    encoded = session.text.encode_batch(texts)
    arrays = {name: array for name, array in encoded.arrays.items() if name in wanted}
    if "input_ids" not in arrays:
        raise SessionError("this model does not read text", hint="it takes " + ", ".join(wanted))
    return arrays, encoded


def image_inputs(session: Session, images: Sequence[Picture]) -> dict[str, Array]:
    """Return {"pixel_values": float32[batch, 3, height, width]} for pictures.

    Raises:
        SessionError: if a picture cannot be read, or the bundle does not say how to prepare it.
    """
    return {"pixel_values": pixel_values(images, read_json_asset(session.bundle, "preprocessor_config.json"))}


def class_labels(session: Session, count: int) -> tuple[str, ...]:
    """Return names for `count` classes: the active adapter's, else the base's, else LABEL_0, LABEL_1, ..."""
    active = session.adapter
    names = list(active) if isinstance(active, Mapping) else [active]
    sources = [session.bundle.labels_of(name if name in session.adapters else None) for name in names]
    # a blend has names only if all its adapters agree on them
    chosen = sources[0] if all(source == sources[0] for source in sources) else ()
    if len(chosen) == count:
        return tuple(chosen)
    return tuple(f"LABEL_{index}" for index in range(count))


def _classify_texts(session: Session, texts: Sequence[Text]) -> list[dict[str, Any]]:
    arrays, encoded = text_inputs(session, texts)
    answers = _classes(session, session.run(arrays)["logits"])
    return [item | {"truncated": cut} for item, cut in zip(answers, encoded.truncated, strict=True)]


def _classify_images(session: Session, images: Sequence[Picture]) -> list[dict[str, Any]]:
    return _classes(session, session.run(image_inputs(session, images))["logits"])


def _classes(session: Session, logits: Array) -> list[dict[str, Any]]:
    config = read_json_asset(session.bundle, "config.json")
    if logits.shape[1] == 1:
        return [{"value": float(row[0])} for row in logits]
    several = config.get("problem_type") == "multi_label_classification"
    scores = 1 / (1 + np.exp(-logits.astype(np.float64))) if several else _softmax(logits)
    return [_ranked(row, class_labels(session, logits.shape[1])) for row in scores]


def _ranked(scores: Array, labels: Sequence[str]) -> dict[str, Any]:
    best = int(scores.argmax())
    return {
        "label": labels[best],
        "score": float(scores[best]),
        "scores": {label: float(score) for label, score in zip(labels, scores, strict=True)},
    }


def _tag_tokens(session: Session, texts: Sequence[Text]) -> list[dict[str, Any]]:
    if any(not isinstance(text, str) for text in texts):
        raise SessionError("token classification takes single texts, not pairs", hint="give each text as a string")
    arrays, encoded = text_inputs(session, texts)
    scores = _softmax(session.run(arrays)["logits"])
    labels = class_labels(session, scores.shape[2])
    valid = (encoded.arrays["attention_mask"] == 1) & (encoded.special_mask == 0)
    answers = []
    for row, text in enumerate(texts):
        tokens = []
        for position in np.flatnonzero(valid[row]):
            start, end = encoded.offsets[row][position]
            best = int(scores[row, position].argmax())
            score = float(scores[row, position, best])
            word = str(text)[start:end]
            tokens.append({"text": word, "label": labels[best], "score": score, "start": start, "end": end})
        answers.append({"tokens": tokens, "truncated": encoded.truncated[row]})
    return answers


def _embed(session: Session, texts: Sequence[Text]) -> list[dict[str, Any]]:
    arrays, encoded = text_inputs(session, texts)
    outputs = session.run(arrays)
    pooled = pool(outputs, encoded.arrays["attention_mask"], read_json_asset(session.bundle, "pooling.json"))
    return [
        {"embedding": [float(value) for value in row], "truncated": cut}
        for row, cut in zip(pooled, encoded.truncated, strict=True)
    ]


def _embed_images(session: Session, images: Sequence[Picture]) -> list[dict[str, Any]]:
    outputs = session.run(image_inputs(session, images))
    return [{"embedding": [float(value) for value in row]} for row in outputs["image_embeds"]]


def pool(outputs: Mapping[str, Array], mask: Array, config: Mapping[str, Any]) -> Array:
    """Return one vector per text, float32[batch, dim].

    Args:
        outputs: with `sentence_embedding` or `text_embeds` float32[batch, dim], or `last_hidden_state`
            float32[batch, seq, dim].
        mask: int64[batch, seq], 1 for tokens.
        config: pooling.json (sentence-transformers' 1_Pooling/config.json), {} for the mean. A `normalize` of true
            makes vectors of length 1.

    Raises:
        SessionError: for a way of pooling that is not supported.
    """
    for name in ("sentence_embedding", "text_embeds"):
        if name in outputs:
            return outputs[name]
    hidden = outputs["last_hidden_state"]
    wanted = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    mode = wanted[0] if len(wanted) == 1 else "pooling_mode_mean_tokens"
    if len(wanted) > 1 or mode not in ("pooling_mode_mean_tokens", "pooling_mode_cls_token", "pooling_mode_max_tokens"):
        raise SessionError(
            f"pooling.json asks for {', '.join(wanted)}, which is not supported",
            hint="pool session.run's outputs yourself",
        )
    weight = mask[:, :, None].astype(np.float32)
    if mode == "pooling_mode_cls_token":
        vectors = hidden[:, 0]
    elif mode == "pooling_mode_max_tokens":
        vectors = np.where(weight > 0, hidden, -np.inf).max(axis=1)
    else:
        vectors = (hidden * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1)
    if config.get("normalize"):
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.asarray(vectors, np.float32)


def _zero_shot(
    session: Session, images: Sequence[Picture], sentences: Sequence[str], labels: Sequence[str]
) -> list[dict[str, Any]]:
    arrays, _ = text_inputs(session, sentences)
    scores = _softmax(session.run(arrays | image_inputs(session, images))["logits_per_image"])
    return [_ranked(row, labels) for row in scores]


def _softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    weight = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return np.asarray(weight / weight.sum(axis=-1, keepdims=True))


_Answers = list[dict[str, Any]]
_OF_TEXTS: dict[str, Callable[[Session, Sequence[Text]], _Answers]] = {
    "text-classification": _classify_texts,
    "token-classification": _tag_tokens,
    "feature-extraction": _embed,
    "sentence-similarity": _embed,
}
_OF_IMAGES: dict[str, Callable[[Session, Sequence[Picture]], _Answers]] = {"image-classification": _classify_images}
