"""What engines of fixed shapes have in common: signatures chosen by shape, a cache that this side keeps.

A decoder has a signature per length of prompt, which begins a text, and "decode", which goes on by one token: it reads
the cache whole, with a mask that says how much of it is valid, and gives the token's keys and values, which are written
into the cache here. A shorter prompt is read in the next longer signature: what stands behind its end changes nothing
before it, and is overwritten as the text goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Array = Any


class FixedShapes:
    """An engine over models with signatures; one for a runtime has `_open` and `_call`, and says what `use` does.

    Options: threads; signatures: by form (the job's models) and name, `inputs` (name to shape) and `outputs`
    """

    NAME = ""
    OPTIONS: tuple[str, ...] = ()
    """Further options."""

    def __init__(self, folder: str, job: dict[str, Any], tensors: dict[str, Array]) -> None:
        unknown = sorted(set(job["options"]) - {"threads", "signatures", *self.OPTIONS})
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r} of the engine {self.NAME}")
        self._folder, self._job, self._tensors = Path(folder), job, tensors
        self._threads: int = job["options"]["threads"]
        self._signatures: dict[str, dict[str, Any]] = job["options"]["signatures"]
        self._models: dict[str, Any] = {}
        self._form, self._fed = "plain", {}  # type: str, dict[str, Array]
        self._cache: dict[str, Array] = {}
        self._mask: Array = None
        self._past = self._rows = 0

    def _open(self, path: Path) -> Any:
        raise NotImplementedError

    def _call(self, model: Any, form: str, signature: str, inputs: dict[str, Array]) -> list[Array]:
        raise NotImplementedError

    def open(self) -> None:
        """Open the plain model."""
        self._model("plain")

    def _choose(self, form: str, fed: dict[str, Array]) -> None:
        """Have a model run, and these arrays fed beside all others."""
        self._form, self._fed = form, fed
        self._model(form)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run a single pass in the signature of the inputs' shapes."""
        shapes = {name: list(value.shape) for name, value in inputs.items()}
        for name, signature in self._signatures[self._form].items():
            if all(signature["inputs"].get(key) == shape for key, shape in shapes.items()):
                found = self._run(name, inputs)
                return {key: value for key, value in found.items() if key in self._job["answers"]}
        raise ValueError(f"the model was converted for other shapes than {shapes}")

    def start(self, ids: Array, capacity: int) -> Array:
        """Begin a text; see `engines`."""
        rows, count = ids.shape
        lengths = sorted(int(name.partition("_")[2]) for name in self._signatures[self._form] if name != "decode")
        width = next((length for length in lengths if length >= count), lengths[-1])
        self._begin(capacity)
        self._rows = rows
        first = min(count, width)
        whole = np.zeros((len(self._mask), width), np.int64)
        whole[:, :first] = self._batched(ids[:, :first])
        found = self._run(f"prefill_{width}", {"input_ids": whole, "logits_from": np.asarray([first - 1], np.int64)})
        self._keep(found, first)
        logits = found["logits"][:rows, -1]
        for place in range(first, count):
            logits = self.step(ids[:, place : place + 1])
        return logits

    def step(self, ids: Array) -> Array:
        """Go on by one token; see `engines`."""
        self._mask[:, self._past] = 1
        found = self._run("decode", {"input_ids": self._batched(ids), "attention_mask": self._mask, **self._cache})
        self._keep(found, 1)
        return found["logits"][: self._rows, -1]

    def close(self) -> None:
        """Free everything."""
        self._models, self._fed, self._cache = {}, {}, {}

    def _model(self, form: str) -> Any:
        if form not in self._models:
            self._models[form] = self._open(self._folder / self._job["models"][form])
        return self._models[form]

    def _run(self, signature: str, inputs: dict[str, Array]) -> dict[str, Array]:
        known = self._signatures[self._form][signature]
        given = {**inputs, **self._fed}
        ordered = {name: given[name] for name in known["inputs"]}
        found = self._call(self._model(self._form), self._form, signature, ordered)
        return dict(zip(known["outputs"], found, strict=True))

    def _begin(self, capacity: int) -> None:
        """Empty the cache: what it holds is masked, so its memory is kept."""
        shapes = self._signatures[self._form]["decode"]["inputs"]
        rows, room = shapes["attention_mask"]
        if capacity > room:
            raise ValueError(f"the model was converted for {room} tokens, not {capacity}")
        if not self._cache:
            names = [pair["past"] for pair in self._job["decoder"]["cache"]]
            self._cache = {name: np.zeros(shapes[name], np.float32) for name in names}
        self._mask = np.zeros((rows, room), np.int64)
        self._past = 0

    def _keep(self, found: dict[str, Array], count: int) -> None:
        """Write the keys and values of `count` tokens into the cache."""
        for pair in self._job["decoder"]["cache"]:
            cache = self._cache[pair["past"]]
            cache[:, :, self._past : self._past + count] = found[pair["present"]][:, :, :count]
        self._past += count
        self._mask[:, : self._past] = 1

    def _batched(self, ids: Array) -> Array:
        """Return ids with as many rows as the model was converted for: the first ones again."""
        return np.resize(np.asarray(ids, np.int64), (len(self._mask), ids.shape[1]))


class FedAdapters(FixedShapes):
    """An engine whose adapters are inputs of the model "slots".

    Options: defaults: a file with what stands for no adapter, by input
    """

    OPTIONS = ("defaults",)

    def __init__(self, folder: str, job: dict[str, Any], tensors: dict[str, Array]) -> None:
        super().__init__(folder, job, tensors)
        self._resident: dict[str | None, dict[str, Array]] = {}

    def use(self, adapter: str | None) -> None:
        """Have an adapter's tensors fed; the base runs in the plain model."""
        if adapter is None:
            self._choose("plain", {})
            return
        if adapter not in self._resident:
            names = self._job["adapters"][adapter]
            self._resident[adapter] = {name: np.asarray(self._tensors[key], order="C") for name, key in names.items()}
        self._choose("slots", self._resident[adapter])

    def idle(self) -> None:
        """Run the base in the model that takes adapters, with what stands for none."""
        if "slots" not in self._job["models"]:
            self.use(None)
            return
        if None not in self._resident:
            with np.load(self._folder / self._job["options"]["defaults"]) as arrays:
                self._resident[None] = {name: np.asarray(arrays[name], order="C") for name in arrays.files}
        self._choose("slots", self._resident[None])

    def close(self) -> None:
        """Free everything."""
        super().close()
        self._resident = {}
