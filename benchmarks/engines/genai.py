"""onnxruntime-genai: its builder's int4 and int8 models, with float LoRA inputs that its builder does not make.

Its own routes to adapters are slower or cannot swap: `adapter_path` bakes the LoRA in as int4 weights, and int4 adapter
inputs decode at less than half of the base's speed. So the graph is edited here by hand (genai_slots.py): the form in
which genai is at its best with a swappable LoRA. The builder needs transformers 5; edgeadapt's exporter needs 4.57.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LABEL = "ONNX Runtime GenAI"
PACKAGES = (
    ("torch==2.13.0",),
    ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "transformers==5.23.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
)
MODULES = ("numpy", "onnxruntime_genai")
VERSIONS = ("onnxruntime-genai", "onnxruntime")
SWITCHES_AT_ONCE = False  # a switch is a new generator, which reads the prompt again
WHOLE = False
EVERY = 1
CONFIGURATIONS: dict[str, dict[str, Any]] = {"int8": {}, "int4": {}}
UNUSED_TOKEN = 49151
"""Greedy decoding never gives it: as the end token it makes every run equally long."""


def prepare(configuration: str, base: str, checkpoint: str, adapters: dict[str, str], folder: str) -> None:
    """Build the plain model, then one with slots for adapters, and the adapters' files."""
    del base
    plain, slots = Path(folder) / "plain", Path(folder) / "slots"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-e", "cpu"]
    _run([*builder, "-p", configuration, "-o", str(plain), "-c", str(Path(folder) / "cache")])
    script = Path(__file__).parent.parent / "genai_slots.py"
    chosen = [path for name, path in adapters.items() if name != "qv8"]
    _run([sys.executable, str(script), str(plain), str(slots), *chosen])


def files(folder: Path, adapter: str) -> dict[str, list[Path]]:
    """The files of the base and of one adapter."""
    return {
        "base": list((folder / "plain").glob("model.onnx*")),
        "adapter": [folder / "slots" / f"{adapter}.onnx_adapter"],
    }


class Engine:
    """One model: with slots if there are adapters, the builder's own if not."""

    def __init__(self, configuration: str, folder: Path, threads: int, adapters: dict[str, str]) -> None:
        import onnxruntime_genai as og

        del configuration
        self._og, self._folder = og, folder / ("slots" if adapters else "plain")
        config = og.Config(str(self._folder))
        options = {"decoder": {"session_options": {"intra_op_num_threads": threads}}}
        config.overlay(json.dumps({"model": {**options, "eos_token_id": UNUSED_TOKEN}}))
        self._model = og.Model(config)
        self._adapters = og.Adapters(self._model)
        self._loaded: set[str] = set()
        self._adapter: str | None = None
        self._generator: Any = None

    def use(self, adapter: str | None) -> None:
        """Load an adapter's file if it is not loaded; the next generator will use it."""
        if adapter is not None and adapter not in self._loaded:
            self._adapters.load(str(self._folder / f"{adapter}.onnx_adapter"), adapter)
            self._loaded.add(adapter)
        self._adapter = adapter

    def forget(self, adapter: str) -> None:
        """Unload an adapter's file."""
        if adapter in self._loaded:
            self._generator = None  # it holds on to its adapter
            self._adapters.unload(adapter)
            self._loaded.remove(adapter)

    def prefill(self, ids: list[int], room: int) -> int:
        """Read a prompt into a new generator; the first token."""
        self._start(ids, room)
        self._generator.generate_next_token()  # only picks the token: append_tokens has the logits
        return int(self._generator.get_next_tokens()[0])

    def decode(self, count: int) -> list[int]:
        """`count` more tokens."""
        tokens = []
        for _ in range(count):
            self._generator.generate_next_token()
            tokens.append(int(self._generator.get_next_tokens()[0]))
        return tokens

    def logits(self, ids: list[int]) -> Any:
        """Logits at every position."""
        self._start(ids, 1)
        return self._generator.get_output("logits")[0]

    def _start(self, ids: list[int], room: int) -> None:
        self._generator = None
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=len(ids) + room, do_sample=False)
        self._generator = self._og.Generator(self._model, parameters)
        if self._adapter is not None:
            self._generator.set_active_adapter(self._adapters, self._adapter)
        self._generator.append_tokens(ids)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[1]).name}: {done.stderr.strip()[-2000:]}")
