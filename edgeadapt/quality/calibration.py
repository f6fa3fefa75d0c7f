"""Samples: what quantization is calibrated and measured on. The user's file, or a few short built-in texts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import RecipeError
from edgeadapt.files import read_bytes

Label = int | str
Messages = Sequence[Mapping[str, str]]

_BUILT_IN = Path(__file__).with_name("texts.txt")
_SEPARATOR = "\n----\n"
_LABELS = "labels"
_ADAPTER = "adapter"
_FORMS = (
    {"text"},
    {"text", "label"},
    {"prompt", "completion"},
    {"messages"},
)
_FORMS_HINT = (
    'each line is {"text": ...}, {"text": ..., "label": ...}, {"prompt": ..., "completion": ...} '
    'or {"messages": [{"role": ..., "content": ...}, ...]}; "adapter": NAME says whose sample it is'
)


@dataclass(frozen=True)
class Calibration:
    """Samples.

    texts: one sample each; empty where arrays are given
    labels: one per sample, a class index or a class name; None where the file has none
    adapters: the adapter that each sample is for, None for every one; empty where no sample says
    arrays: samples by the model's input name, stacked on axis 0, instead of texts
    """

    texts: tuple[str, ...]
    labels: tuple[Label, ...] | None = None
    arrays: Mapping[str, NDArray[np.generic]] | None = None
    adapters: tuple[str | None, ...] = ()

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self.texts) if self.arrays is None else len(next(iter(self.arrays.values())))


def built_in() -> Calibration:
    """Return twelve short texts (prose, dialogue, code, JSON, a table query): about 1 300 tokens in all."""
    texts = _BUILT_IN.read_text(encoding="utf-8").strip("\n").split(_SEPARATOR)
    return Calibration(tuple(text.strip("\n") for text in texts))


def split(samples: Calibration, *, every: int = 4) -> tuple[Calibration, Calibration]:
    """Return (samples to calibrate with, samples to measure with): every `every`-th sample is for measuring only.

    Of each adapter's own samples every `every`-th is. With fewer than twice as many samples as `every`, or an adapter
    that has too few, nothing can be spared, and both are all samples: a quality that was measured on the calibration
    texts themselves is flattering.
    """
    if samples.count < 2 * every:
        return samples, samples
    names = samples.adapters or (None,) * samples.count
    order = [names[:row].count(name) for row, name in enumerate(names)]
    held_out = np.array(order) % every == every - 1
    if {name for name, held in zip(names, held_out, strict=True) if held} != set(names):
        return samples, samples
    return _select(samples, np.flatnonzero(~held_out)), _select(samples, np.flatnonzero(held_out))


def samples_of(samples: Calibration, adapter: str | None) -> Calibration:
    """Return the samples for one adapter: its own and those that are for all; for the base (None) the latter.

    Where every sample is some adapter's, the base gets them all.
    """
    if not samples.adapters:
        return samples
    rows = [row for row, name in enumerate(samples.adapters) if name is None or name == adapter]
    return _select(samples, np.array(rows, np.intp)) if rows or adapter is not None else samples


def fitted_samples(samples: Calibration, adapter: str | None) -> Calibration:
    """Return what weights are fitted to for one adapter: its own samples if it has any, else those that are for all.

    The base serves the samples that are for all; were they for the adapters too, the few own ones would not count.
    """
    own = [row for row, name in enumerate(samples.adapters) if name is not None and name == adapter]
    return _select(samples, np.array(own, np.intp)) if own else samples_of(samples, adapter)


def check_adapters(samples: Calibration, names: Sequence[str]) -> None:
    """Return if every sample is for one of the adapters `names`, or for all, and each adapter has a sample.

    Raises:
        RecipeError: if not.
    """
    unknown = sorted({name for name in samples.adapters if name is not None and name not in names})
    if unknown:
        raise RecipeError(
            f"samples are for the adapter {unknown[0]!r}, which is not exported",
            hint=f"known: {', '.join(names)}; leave it out for samples that are for all",
        )
    without = [name for name in names if not samples_of(samples, name).count]
    if without:
        raise RecipeError(
            f"there is no sample for the adapter {without[0]!r}",
            hint=f'add lines with "adapter": "{without[0]}", or lines without "adapter", which are for all',
        )


def read_calibration(path: Path, *, render: Callable[[Messages], str] | None = None) -> Calibration:
    """Return the samples in a file: .txt (one text a line), .jsonl or .npz (arrays by input name, optional "labels").

    Args:
        path: the file.
        render: makes a text of chat messages, as the model's chat template does; None for "role: content" lines.

    Raises:
        FileError: if the file cannot be read.
        RecipeError: if it is of another type, damaged or empty, naming the line or array.
    """
    readers = {".txt": _read_lines, ".jsonl": _read_json_lines, ".npz": _read_arrays}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise RecipeError(
            f"{path.name}: samples in a {path.suffix or 'nameless'} file cannot be read",
            hint="give a .txt file (one text a line), a .jsonl file (one object a line) or an .npz file (arrays)",
        )
    return reader(path, render or _plain_messages)


def _read_lines(path: Path, _render: Callable[[Messages], str]) -> Calibration:
    texts = tuple(line.strip() for line in _decode(path).splitlines() if line.strip())
    if not texts:
        raise RecipeError(f"{path.name} holds no text", hint="write one text a line")
    return Calibration(texts)


def _read_json_lines(path: Path, render: Callable[[Messages], str]) -> Calibration:
    entries = [
        (_parse(line, where), where)
        for number, line in enumerate(_decode(path).splitlines(), start=1)
        if line.strip() and (where := f"{path.name} line {number}")
    ]
    if not entries:
        raise RecipeError(f"{path.name} holds no sample", hint=_FORMS_HINT)
    owners = [_owner(entry, where) for entry, where in entries]
    samples = [_sample(entry, where, render) for entry, where in entries]
    labels = [label for _, label in samples if label is not None]
    if labels and len(labels) != len(samples):
        raise RecipeError(
            f"{path.name}: {len(labels)} of {len(samples)} samples have a label", hint="label all of them, or none"
        )
    texts = tuple(text for text, _ in samples)
    return Calibration(texts, tuple(labels) or None, adapters=tuple(owners) if any(owners) else ())


def _owner(entry: Any, where: str) -> str | None:
    """Return the name of the adapter that a sample is for, and take it out of the entry."""
    name = entry.pop(_ADAPTER, None) if isinstance(entry, dict) else None
    if name is not None and (not isinstance(name, str) or not name):
        raise RecipeError(f"{where}: adapter is {name!r}", hint="give the adapter's name in the bundle")
    return name


def _sample(entry: Any, where: str, render: Callable[[Messages], str]) -> tuple[str, Label | None]:
    if not isinstance(entry, dict) or set(entry) not in _FORMS:
        found = f"an object with {', '.join(sorted(entry)) or 'nothing'}" if isinstance(entry, dict) else repr(entry)
        raise RecipeError(f"{where} is {found[:200]}", hint=_FORMS_HINT)
    if "messages" in entry:
        return _text(render(_messages(entry["messages"], where)), where, "messages"), None
    if "prompt" in entry:
        return _text(entry["prompt"], where, "prompt") + _text(entry["completion"], where, "completion"), None
    label = entry.get("label")
    if "label" in entry and (isinstance(label, bool) or not isinstance(label, int | str)):
        raise RecipeError(f"{where}: label is {label!r}", hint="give a class index or a class name")
    return _text(entry["text"], where, "text"), label


def _messages(value: Any, where: str) -> Messages:
    valid = isinstance(value, list) and value
    if not valid or not all(
        isinstance(item, dict) and set(item) == {"role", "content"} and all(isinstance(x, str) for x in item.values())
        for item in value
    ):
        raise RecipeError(f"{where}: messages is not a list of chat messages", hint=_FORMS_HINT)
    return list(value)


def _plain_messages(messages: Messages) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _text(value: Any, where: str, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{where}: {key} is {value!r}", hint="give a text that is not empty")
    return value


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise RecipeError(f"{where} is not JSON: {error}", hint=_FORMS_HINT) from error


def _read_arrays(path: Path, _render: Callable[[Messages], str]) -> Calibration:
    data = io.BytesIO(read_bytes(path))
    try:
        with np.load(data, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, BadZipFile, EOFError, KeyError) as error:
        raise RecipeError(
            f"{path.name} is no .npz file of plain arrays: {error}",
            hint="write it with numpy.savez(path, input_ids=..., attention_mask=...)",
        ) from error
    labels = arrays.pop(_LABELS, None)
    if not arrays:
        raise RecipeError(f"{path.name} holds no array", hint="store each input under its name, samples on axis 0")
    count = _check_arrays(path, arrays)
    return Calibration((), None if labels is None else _array_labels(path, labels, count), arrays)


def _check_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> int:
    count = len(next(iter(arrays.values()))) if next(iter(arrays.values())).ndim else 0
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != count or count == 0:
            raise RecipeError(
                f"{path.name}: {name} has the shape {list(array.shape)}, expected samples on axis 0, {count} as in "
                f"{next(iter(arrays))}",
                hint="stack the samples of every input on axis 0",
            )
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            wrong = "NaN or infinity" if array.dtype.kind == "f" else f"values of type {array.dtype}"
            raise RecipeError(f"{path.name}: {name} holds {wrong}", hint="give finite numbers")
    return count


def _array_labels(path: Path, labels: NDArray[Any], count: int) -> tuple[Label, ...]:
    if labels.shape != (count,) or labels.dtype.kind not in "iuU":
        raise RecipeError(
            f"{path.name}: labels is {labels.dtype}{list(labels.shape)}, expected {count} class indices or names",
            hint="store one whole number or name per sample under the name labels",
        )
    return tuple(labels.tolist())


def _decode(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path.name} is not UTF-8 text: {error}", hint="save it as UTF-8") from error


def _select(samples: Calibration, rows: NDArray[np.intp]) -> Calibration:
    arrays = None if samples.arrays is None else {name: array[rows] for name, array in samples.arrays.items()}
    labels = None if samples.labels is None else tuple(samples.labels[row] for row in rows)
    texts = tuple(samples.texts[row] for row in rows) if samples.texts else ()
    return Calibration(texts, labels, arrays, tuple(samples.adapters[row] for row in rows) if samples.adapters else ())
