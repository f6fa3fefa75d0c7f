"""optimum with ONNX Runtime, float32: no route for adapters but to merge one and export a whole model for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABEL = "optimum + ONNX Runtime (merged, float32)"
PACKAGES = (
    ("torch==2.13.0",),
    ("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6", "peft==0.21.2", "safetensors"),
)
MODULES = ("numpy", "onnxruntime", "optimum.onnxruntime")
VERSIONS = ("optimum", "optimum-onnx", "onnxruntime", "torch", "transformers")
SWITCHES_AT_ONCE = True  # by loading another whole model
WHOLE = False
EVERY = 3  # takes part in every third round: slow
CONFIGURATIONS: dict[str, dict[str, Any]] = {"fp32": {}}


def prepare(configuration: str, base: str, checkpoint: str, adapters: dict[str, str], folder: str) -> None:
    """Export the base, and the base with each adapter merged."""
    del configuration, base
    from optimum.exporters.onnx import main_export
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, path in {"base": None, **adapters}.items():
        if name == "qv8":
            continue
        source = Path(checkpoint)
        if path is not None:
            source = Path(folder) / f"{name}-merged"
            model = AutoModelForCausalLM.from_pretrained(checkpoint)
            merged: Any = PeftModel.from_pretrained(model, path).merge_and_unload()
            merged.save_pretrained(source)
            AutoTokenizer.from_pretrained(checkpoint).save_pretrained(source)
        main_export(str(source), output=Path(folder) / name, task="text-generation-with-past", do_validation=False)
        for file in source.glob("*.safetensors") if path is not None else ():
            file.unlink()


def files(folder: Path, adapter: str) -> dict[str, list[Path]]:
    """The files of the base; an adapter is a whole model too."""
    return {
        "base": list((folder / "base").glob("model.onnx*")),
        "adapter": list((folder / adapter).glob("model.onnx*")),
    }


class Engine:
    """One model per adapter."""

    def __init__(self, configuration: str, folder: Path, threads: int, adapters: dict[str, str]) -> None:
        del configuration
        self._folder, self._threads = folder, threads
        self._models: dict[str | None, Any] = {}
        self._model: Any = None
        self._cache: Any = None
        self._length = self._token = 0
        self.use(next(iter(adapters)) if adapters else None)

    def use(self, adapter: str | None) -> None:
        """Load the adapter's model if it is not loaded."""
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        if adapter not in self._models:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._threads
            self._models[adapter] = ORTModelForCausalLM.from_pretrained(
                self._folder / (adapter or "base"), session_options=options, provider="CPUExecutionProvider"
            )
        self._model = self._models[adapter]

    def forget(self, adapter: str) -> None:
        """Drop the adapter's model."""
        self._models.pop(adapter, None)

    def prefill(self, ids: list[int], room: int) -> int:
        """Read a prompt; the first token."""
        del room
        self._cache, self._length = None, 0
        return self._next(ids)

    def decode(self, count: int) -> list[int]:
        """`count` more tokens."""
        return [self._next([self._token]) for _ in range(count)]

    def logits(self, ids: list[int]) -> Any:
        """Logits at every position."""
        self._cache, self._length = None, 0
        return self._run(ids).logits[0].numpy()

    def _next(self, ids: list[int]) -> int:
        out = self._run(ids)
        self._cache, self._token = out.past_key_values, int(out.logits[0, -1].argmax())
        return self._token

    def _run(self, ids: list[int]) -> Any:
        import torch

        start, self._length = self._length, self._length + len(ids)
        return self._model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, self._length, dtype=torch.int64),
            position_ids=torch.arange(start, self._length)[None],
            past_key_values=self._cache,
            use_cache=True,
        )
