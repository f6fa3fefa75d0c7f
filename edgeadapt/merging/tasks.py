"""Tasks by optimum's names, and the transformers class that does each."""

from __future__ import annotations

from typing import Any

from edgeadapt.errors import BaseModelError

# Where a class does several tasks (CLIPModel), the first one wins.
AUTO_CLASSES: dict[str, tuple[str, ...]] = {
    "text-generation": ("AutoModelForCausalLM",),
    "text2text-generation": ("AutoModelForSeq2SeqLM",),
    "automatic-speech-recognition": ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"),
    "text-classification": ("AutoModelForSequenceClassification",),
    "token-classification": ("AutoModelForTokenClassification",),
    "question-answering": ("AutoModelForQuestionAnswering",),
    "multiple-choice": ("AutoModelForMultipleChoice",),
    "fill-mask": ("AutoModelForMaskedLM",),
    "image-classification": ("AutoModelForImageClassification",),
    "zero-shot-image-classification": ("AutoModelForZeroShotImageClassification",),
    "semantic-segmentation": ("AutoModelForSemanticSegmentation",),
    "object-detection": ("AutoModelForObjectDetection",),
    "audio-classification": ("AutoModelForAudioClassification",),
    "feature-extraction": ("AutoModel",),
}
LABELLED = frozenset(
    {"text-classification", "token-classification", "image-classification", "audio-classification",
     "semantic-segmentation"}
)  # fmt: skip
# Tasks whose head is trained together with an adapter, so that a base may lack it.
OWN_HEAD = LABELLED | {"question-answering", "multiple-choice", "object-detection"}


def model_class(config: Any, task: str | None, where: str) -> tuple[str, Any]:
    """Return (task, transformers class) for a config; without a task, what `config.architectures` says.

    Raises:
        BaseModelError: if the model has no such task, or the config does not tell its task.
    """
    fitting = {name: classes for name in AUTO_CLASSES if (classes := _classes(config, name))}
    if task is None:
        return _by_architecture(config, fitting, where)
    if task not in AUTO_CLASSES:
        raise BaseModelError(f"unknown task {task!r}", hint=f"known: {', '.join(sorted(AUTO_CLASSES))}")
    if task not in fitting:
        raise BaseModelError(
            f"{where}: a {config.model_type} model cannot do the task {task!r}",
            hint=f"it can do: {', '.join(sorted(fitting)) or 'nothing that edgeadapt knows'}",
        )
    wanted = set(config.architectures or ())
    classes = fitting[task]
    return task, next((cls for cls in classes if cls.__name__ in wanted), classes[0])


def _by_architecture(config: Any, fitting: dict[str, tuple[Any, ...]], where: str) -> tuple[str, Any]:
    architectures = list(config.architectures or ())
    for task, classes in fitting.items():
        for cls in classes:
            if cls.__name__ in architectures:
                return task, cls
    said = f"names the architecture {architectures[0]!r}" if architectures else "names no architecture"
    raise BaseModelError(
        f"{where}: config.json {said}, which tells no task",
        hint=f"give the task, one of: {', '.join(sorted(fitting)) or 'none is known for this model'}",
    )


def _classes(config: Any, task: str) -> tuple[Any, ...]:
    """Return the transformers classes that do `task` for this kind of config."""
    import transformers

    found: list[Any] = []
    for name in AUTO_CLASSES[task]:
        mapping = getattr(transformers, name)._model_mapping  # noqa: SLF001 - there is no public way to ask
        if type(config) in mapping:
            entry = mapping[type(config)]
            found.extend(entry if isinstance(entry, (list, tuple)) else [entry])
    return tuple(found)
