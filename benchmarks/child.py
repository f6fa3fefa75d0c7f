"""A measured child process: python child.py ENGINE_FILE. One JSON request per line in, one JSON answer per line out.

Only the standard library: it runs in each engine's own environment. All timing of calls happens here, the same way for
every engine; an engine only does the work (README.md says what it has to have). An exception becomes {"error": ...}, so
that the parent records a failure instead of losing the run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

Verb = Callable[..., dict[str, Any]]


def serve(verbs: Mapping[str, Verb]) -> None:
    """Answer requests {"do": verb, **arguments} from stdin until it ends."""
    # Libraries print to stdout; answers go to a private copy of it.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        verb = request.pop("do")
        try:
            answer = verbs[verb](**request)
        except Exception as error:  # noqa: BLE001 - the parent records it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def load_engine(file: Path) -> ModuleType:
    """Import an engine's file. By path: `engines/openvino.py` must not hide the package openvino."""
    spec = importlib.util.spec_from_file_location(f"engine_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Child:
    """The verbs, around one engine."""

    def __init__(self, engine: ModuleType) -> None:
        self._module = engine
        self._engine: Any = None

    def prepare(self, **arguments: Any) -> dict[str, Any]:
        """Make the engine's model files."""
        return self._module.prepare(**arguments) or {}

    def load(self, configuration: str, folder: str, threads: int, adapters: dict[str, str]) -> dict[str, Any]:
        """Open the model; `adapters` (name to PEFT folder) is empty for the plain form."""
        started = perf_counter()
        for name in self._module.MODULES:
            import_module(name)
        imported = perf_counter()
        self._engine = self._module.Engine(configuration, Path(folder), threads, adapters)
        loaded = perf_counter()
        versions = {name: version(name) for name in self._module.VERSIONS}
        return {"import_s": imported - started, "load_s": loaded - imported, "versions": versions}

    def prefill(self, adapter: str | None, ids: list[int], room: int) -> dict[str, Any]:
        """Read a prompt with `room` tokens to come after it; the adapter is made active before the clock starts."""
        self._engine.use(adapter)
        started = perf_counter()
        token = self._engine.prefill(ids, room)
        return {"seconds": perf_counter() - started, "token": token}

    def decode(self, adapter: str | None, count: int) -> dict[str, Any]:
        """Go on greedily where the last prefill or decode with this adapter stopped: one token untimed, then `count`.

        The untimed token brings back what other processes have thrown out of the caches.
        """
        self._engine.use(adapter)
        tokens = self._engine.decode(1)
        started = perf_counter()
        tokens = tokens + self._engine.decode(count)
        return {"seconds": perf_counter() - started, "tokens": tokens}

    def generate(self, adapter: str | None, ids: list[int], count: int) -> dict[str, Any]:
        """Prompt and `count` tokens in one call, for an engine that cannot be asked token by token.

        Answers like `decode`, with the seconds of the tokens after the first two.
        """
        self._engine.use(adapter)
        times, tokens = self._engine.generate(ids, count + 2)
        return {"seconds": times[-1] - times[1], "tokens": tokens}

    def swap(
        self, adapter: str, other: str | None, resident: bool, ids: list[int], first_token: bool
    ) -> dict[str, Any]:
        """Make `adapter` active after `other` was; call to ready, and call to first token after the prompt `ids`.

        Not `resident`: the engine has to read it from disk again.
        """
        self._engine.use(other)
        if first_token:
            self._engine.prefill(ids[::-1], 2)  # another text: the next one shall not be known
        if not resident:
            self._engine.forget(adapter)
        started = perf_counter()
        self._engine.use(adapter)
        ready = perf_counter()
        if first_token:
            self._engine.prefill(ids, 2)
        ended = perf_counter()
        return {
            "ready_s": ready - started if self._module.SWITCHES_AT_ONCE else None,
            "first_token_s": ended - started if first_token else None,
        }

    def logits(self, adapter: str | None, ids: list[int], path: str) -> dict[str, Any]:
        """Save the logits at every position of `ids` as float32[positions, vocab], if the engine gives them."""
        import numpy as np

        self._engine.use(adapter)
        logits = self._engine.logits(ids)
        if logits is None:
            return {"given": False}
        np.save(path, np.asarray(logits, np.float32))
        return {"given": True}

    def top1(self, adapter: str | None, ids: list[int], first: int) -> dict[str, Any]:
        """The engine's next token after each prefix of `ids` of `first` tokens or more; for engines without logits."""
        self._engine.use(adapter)
        return {"tokens": [self._engine.prefill(ids[:end], 2) for end in range(first, len(ids) + 1)]}

    def extra(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Something that only this engine does."""
        found: dict[str, Any] = getattr(self._engine, name)(**arguments)
        return found

    def verbs(self) -> dict[str, Verb]:
        """The requests that this child answers."""
        names = ("prepare", "load", "prefill", "decode", "generate", "swap", "logits", "top1", "extra")
        return {name: getattr(self, name) for name in names}


if __name__ == "__main__":
    serve(Child(load_engine(Path(sys.argv[1]))).verbs())
