"""LiteRT with XNNPACK, through its Python interface, which copies inputs in and outputs out with every call."""

from __future__ import annotations

from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from ai_edge_litert.interpreter import Interpreter

from ._fixed import FedAdapters

Array = Any


def version() -> str:
    """Return LiteRT's version."""
    return version_of("ai-edge-litert")


class Engine(FedAdapters):
    """The .tflite models of a job."""

    NAME = "litert"

    def _open(self, path: Path) -> Any:
        """Open a model and ready all of its signatures' tensors."""
        interpreter = Interpreter(str(path), num_threads=self._threads)
        runners = {name: interpreter.get_signature_runner(name) for name in interpreter.get_signature_list()}
        details = {name: runner.get_input_details() for name, runner in runners.items()}
        return interpreter, runners, details

    def _call(self, model: Any, _form: str, signature: str, inputs: dict[str, Array]) -> list[Array]:
        """Run a signature; its inputs are named by their place, and whole numbers are int32 there."""
        _, runners, details = model
        given = {f"args_{place}": array for place, array in enumerate(inputs.values())}
        wanted = details[signature]  # what no operator reads is no input
        fed = {name: given[name].astype(info["dtype"], copy=False) for name, info in wanted.items()}
        found = runners[signature](**fed)
        return [found[f"output_{place}"] for place in range(len(found))]
